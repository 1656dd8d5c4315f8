"""Heads against NumPy and PyTorch, the joint loss against its terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.exits import (
    BiLSTMHead,
    LinearHead,
    exit_ctc_losses,
    exit_loss,
    self_distillation,
)
from edgespeech.ops.ctc import ctc_loss
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.modules import randomize

D, V, WIDTH = 6, 5, 3
LENGTHS = np.array([6, 3, 2, 1])
TARGETS = jnp.array([[1, 2], [3, 3], [1, 0], [2, 0]])
TARGET_LENGTHS = jnp.array([2, 2, 1, 1])
call = nnx.jit(lambda head, x, lengths: head(x, lengths))


def frames(seed=0, d=D):
    return np.random.default_rng(seed).normal(size=(4, 6, d))


def logits(e=3):
    return [np.float32(frames(seed, V)) for seed in range(e)]


def lstm(gates, recurrent):
    """One direction of one utterance, float64: `[n 4w] -> [n w]`."""
    w = len(recurrent)
    c, y, outputs = np.zeros(w), np.zeros(w), []
    for gate in gates:
        i, f, g, o = np.split(gate + y @ recurrent, 4)
        c = reference.sigmoid(f) * c + reference.sigmoid(i) * np.tanh(g)
        y = reference.sigmoid(o) * np.tanh(c)
        outputs.append(y)
    return np.stack(outputs)


def bilstm_head(w, x):
    gates = reference.linear(reference.part(w, "inputs"), x)
    forward = lstm(gates[:, : 4 * WIDTH], w["recurrent"][0])
    backward = lstm(gates[::-1, 4 * WIDTH :], w["recurrent"][1])[::-1]
    return reference.linear(reference.part(w, "output"), np.concatenate([forward, backward], 1))


@pytest.mark.parametrize("kind", ["linear", "bilstm"])
def test_head(kind):
    head = LinearHead(D, V, rngs=nnx.Rngs(0))
    if kind == "bilstm":
        head = BiLSTMHead(D, V, WIDTH, rngs=nnx.Rngs(0))
    head, x = randomize(head), frames()
    out = padding_contract(lambda x, n: call(head, x, n), np.float32(x), LENGTHS, rows=(1, 3))
    w = reference.parameters(head)
    for row, n in enumerate(LENGTHS):
        own = x[row, :n]
        want = (
            bilstm_head(w, own)
            if kind == "bilstm"
            else reference.linear(reference.part(w, "output"), own)
        )
        np.testing.assert_allclose(out[row, :n], want, atol=1e-5)


def test_bilstm_equals_torch():
    torch = pytest.importorskip("torch")
    head = randomize(BiLSTMHead(D, V, WIDTH, rngs=nnx.Rngs(0)))
    w = {k: torch.from_numpy(np.float32(v)) for k, v in reference.parameters(head).items()}
    theirs = torch.nn.LSTM(D, WIDTH, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for direction, suffix in enumerate(("l0", "l0_reverse")):
            own = slice(direction * 4 * WIDTH, (direction + 1) * 4 * WIDTH)
            getattr(theirs, f"weight_ih_{suffix}").copy_(w["inputs.kernel"][:, own].T)
            getattr(theirs, f"bias_ih_{suffix}").copy_(w["inputs.bias"][own])
            getattr(theirs, f"weight_hh_{suffix}").copy_(w["recurrent"][direction].T)
            getattr(theirs, f"bias_hh_{suffix}").zero_()
        x = np.float32(frames())
        want = theirs(torch.from_numpy(x))[0] @ w["output.kernel"] + w["output.bias"]
    np.testing.assert_allclose(call(head, x, np.full(4, 6)), want.numpy(), atol=1e-5)


# -------------------------------------------------------------------------------------- losses


def kl(teacher, student):
    """`sum p log(p / q)` of every frame, from logits, float64."""

    def log_softmax(z):
        z = np.float64(z)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    p, q = log_softmax(teacher), log_softmax(student)
    return (np.exp(p) * (p - q)).sum(-1)


def test_ctc_of_every_exit():
    losses = exit_ctc_losses(logits(), LENGTHS, TARGETS, TARGET_LENGTHS)
    assert losses.shape == (3, 4)
    for got, exit in zip(losses, logits(), strict=True):
        want = ctc_loss(jnp.asarray(exit), jnp.asarray(LENGTHS), TARGETS, TARGET_LENGTHS)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_self_distillation():
    z, t = logits(), 2.0
    z[0][1, 3:] = np.nan  # padding
    got = self_distillation(z, LENGTHS, t)
    for m in range(2):
        per_frame = kl(z[2] / t, z[m] / t)
        want = [t**2 * per_frame[row, :n].mean() for row, n in enumerate(LENGTHS)]
        np.testing.assert_allclose(got[m], want, rtol=1e-4)


def test_the_teacher_is_a_constant():
    gradient = jax.grad(lambda z: jnp.sum(self_distillation(z, LENGTHS)))(
        [jnp.asarray(exit) for exit in logits()]
    )
    assert [bool(jnp.any(exit != 0)) for exit in gradient] == [True, True, False]


def test_joint_loss():
    z = logits()
    ctc = np.float64(exit_ctc_losses(z, LENGTHS, TARGETS, TARGET_LENGTHS))
    distance = np.float64(self_distillation(z, LENGTHS, 3.0))

    def loss(**options):
        return exit_loss(z, LENGTHS, TARGETS, TARGET_LENGTHS, **options)

    np.testing.assert_allclose(loss(), ctc.sum(0), rtol=1e-5)
    weights = (0.5, 0.0, 2.0)
    want = 0.5 * ctc[0] + 2.0 * ctc[2]
    np.testing.assert_allclose(loss(weights=weights), want, rtol=1e-5)
    got = loss(weights=weights, distillation=0.3, temperature=3.0)
    np.testing.assert_allclose(got, want + 0.3 * distance.sum(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1.0, 1.0)}, "give 3 numbers"),
        ({"weights": (1.0, -1.0, 1.0)}, "at least 0"),
        ({"weights": (0.0, 0.0, 0.0)}, "not all 0"),
        ({"distillation": -0.1}, "distillation is -0.1"),
        ({"distillation": 1.0, "temperature": 0.0}, "temperature 0.0"),
    ],
)
def test_loss_names_what_is_wrong(options, message):
    with pytest.raises(InputError, match=message):
        exit_loss(logits(), LENGTHS, TARGETS, TARGET_LENGTHS, **options)


def test_one_exit_has_no_teacher():
    with pytest.raises(InputError, match="over 1 exits"):
        self_distillation(logits(1), LENGTHS)
