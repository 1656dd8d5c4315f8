"""CTC against the sum over all alignments, one by one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.ops.ctc import ctc_feasible, ctc_log_probs, ctc_loss, greedy_path
from tests.support.gradients import numeric_derivative

loss_jit = jax.jit(ctc_loss)


@jax.jit
def gradient(logits, lengths, targets, target_lengths, weight):
    def total(logits):
        return jnp.sum(weight * ctc_loss(logits, lengths, targets, target_lengths))

    return jax.grad(total)(logits)


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def collapse(path):
    return [token for token, _ in itertools.groupby(path) if token != 0]


def enumerate_loss(logits, length, target):
    """`-log` of the summed probability of every path that collapses to the target, float64."""
    log_p = log_softmax(np.float64(logits[:length]))
    total = 0.0
    for path in itertools.product(range(logits.shape[1]), repeat=length):
        if collapse(path) == list(target):
            total += np.exp(sum(log_p[i, token] for i, token in enumerate(path)))
    return -np.log(total)


# Frames and targets of one batch: repeats, an empty target, one token a frame, a single frame.
CASES = [
    (5, [1, 2]),
    (5, [1, 1]),
    (4, []),
    (3, [2, 1, 2]),
    (1, [2]),
    (5, [2, 1, 1]),
    (4, [1, 1, 2]),
]
N, U, V = 5, 3, 3


def batch(cases=CASES, fill=0, seed=0):
    logits = 2.0 * np.random.default_rng(seed).normal(size=(len(cases), N, V))
    lengths = jnp.array([length for length, _ in cases])
    targets = jnp.array([target + [fill] * (U - len(target)) for _, target in cases])
    return logits, lengths, targets, jnp.array([len(target) for _, target in cases])


def test_loss_is_the_sum_over_all_alignments():
    logits, *rest = batch()
    want = [enumerate_loss(logits[i], *case) for i, case in enumerate(CASES)]
    np.testing.assert_allclose(loss_jit(np.float32(logits), *rest), want, rtol=2e-6, atol=2e-6)


def test_gradient_of_the_loss():
    logits, *rest = batch()
    rng = np.random.default_rng(1)
    weight, direction = rng.normal(size=len(CASES)), rng.normal(size=logits.shape)

    got = np.float64(gradient(np.float32(logits), *rest, np.float32(weight)))
    for i, (length, target) in enumerate(CASES):
        want = numeric_derivative(
            lambda x, length=length, target=target: enumerate_loss(x, length, target),
            [logits[i]],
            [direction[i]],
        )
        assert np.sum(got[i] * direction[i]) == pytest.approx(weight[i] * want, rel=2e-5, abs=2e-5)
        np.testing.assert_array_equal(got[i, length:], 0.0)


def test_what_is_beyond_a_target_is_ignored():
    logits, *rest = batch()
    want = loss_jit(np.float32(logits), *rest)
    for fill in (1, 2):
        _, *rest = batch(fill=fill)
        np.testing.assert_array_equal(loss_jit(np.float32(logits), *rest), want)


def test_padding_and_neighbours_change_nothing():
    logits, lengths, targets, target_lengths = batch()
    logits = np.float32(logits)
    weight = jnp.ones(len(CASES))
    want = loss_jit(logits, lengths, targets, target_lengths)
    want_grad = gradient(logits, lengths, targets, target_lengths, weight)
    valid = jnp.arange(N)[None, :, None] < lengths[:, None, None]
    nan = jnp.where(valid, logits, jnp.nan).at[0].set(jnp.nan)
    got = loss_jit(nan, lengths, targets, target_lengths)
    grad = gradient(nan, lengths, targets, target_lengths, weight)
    np.testing.assert_array_equal(got[1:], want[1:])
    np.testing.assert_array_equal(grad[1:], want_grad[1:])
    row = slice(3, 4)
    alone = loss_jit(logits[row, :3], lengths[row], targets[row], target_lengths[row])
    np.testing.assert_allclose(alone[0], want[3], rtol=1e-6)


# No alignment: no frames, a target longer than the frames, repeats without room for a blank.
IMPOSSIBLE = [(0, []), (0, [1]), (1, [1, 2]), (2, [1, 1]), (3, [1, 1, 1]), (4, [2, 2, 2]), (5, [1])]


def test_impossible_targets_cost_nothing():
    logits, *rest = batch(IMPOSSIBLE)
    loss = loss_jit(np.float32(logits), *rest)
    np.testing.assert_array_equal(loss[:-1], 0.0)
    assert float(loss[-1]) == pytest.approx(enumerate_loss(logits[-1], 5, [1]), rel=1e-5)
    grad = gradient(np.float32(logits), *rest, jnp.ones(len(IMPOSSIBLE)))
    np.testing.assert_array_equal(grad[:-1], 0.0)
    assert np.abs(grad[-1]).max() > 0


def test_feasible_is_whether_a_path_exists():
    cases = [
        (n, list(target))
        for n in range(5)
        for u in range(4)
        for target in itertools.product((1, 2), repeat=u)
    ]
    _, lengths, targets, target_lengths = batch(cases, fill=2)
    got = np.asarray(ctc_feasible(lengths, targets, target_lengths))
    paths = {
        n: {tuple(collapse(p)) for p in itertools.product(range(3), repeat=n)} for n in range(5)
    }
    for (n, target), feasible in zip(cases, got, strict=True):
        assert feasible == (tuple(target) in paths[n]), (n, target)


def test_a_batch_of_empty_targets_only():
    logits = np.float32(np.random.default_rng(2).normal(size=(2, 4, V)))
    none, zero = jnp.zeros((2, 0), jnp.int32), jnp.zeros(2, jnp.int32)
    lengths = jnp.array([4, 2])
    got = ctc_loss(logits, lengths, none, zero)
    want = [enumerate_loss(np.asarray(logits[i]), n, []) for i, n in enumerate((4, 2))]
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_a_certain_target_costs_zero_and_never_less():
    path = [1, 0, 2, 2, 0]
    logits = 60.0 * jax.nn.one_hot(jnp.array([path]), V)
    args = jnp.array([5]), jnp.array([[1, 2]]), jnp.array([2])
    loss = loss_jit(logits, *args)
    assert 0.0 <= float(loss[0]) < 1e-5
    assert np.isfinite(gradient(logits, *args, jnp.ones(1))).all()


def test_an_improbable_target_has_a_large_but_finite_cost():
    logits = 300.0 * jax.nn.one_hot(jnp.zeros((1, 5), jnp.int32), V)
    args = jnp.array([5]), jnp.array([[1, 2]]), jnp.array([2])
    assert float(loss_jit(logits, *args)[0]) == pytest.approx(600.0, rel=0.01)
    assert np.isfinite(gradient(logits, *args, jnp.ones(1))).all()


def test_low_precision_logits_are_summed_in_float32():
    logits, *rest = batch()
    low = jnp.bfloat16(logits)
    got = ctc_loss(low, *rest)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, ctc_loss(low.astype(jnp.float32), *rest))


def test_greedy_path_is_the_best_token_and_blank_beyond():
    logits = jnp.array([[[0.0, 2, 1], [3, 2, 1], [0, 1, 5], [0, 9, 1]]] * 2)
    np.testing.assert_array_equal(
        greedy_path(logits, jnp.array([4, 3])), [[1, 0, 2, 1], [1, 0, 2, 0]]
    )


def test_log_probs():
    logits, *_ = batch()
    got = ctc_log_probs(jnp.bfloat16(logits))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, log_softmax(np.float64(jnp.bfloat16(logits))), atol=1e-6)
