"""The edge Conformer: against NumPy, its streaming contract, its training objective, float16."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.data.batching import Batch
from edgespeech.errors import InputError
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.models.edge_conformer_config import EdgeConformerConfig, draw_chunks
from edgespeech.nn.chunk_attention import FULL_CONTEXT, Chunks
from edgespeech.nn.lpa import harden
from edgespeech.nn.lpa_config import LPAConfig
from edgespeech.training.multitask import multitask_objective
from tests.nn.test_streaming_conformer import layer_by_loops
from tests.nn.test_streaming_features import running_norm
from tests.support import reference
from tests.support.modules import randomize
from tests.support.streaming import verify_streaming_contract

SMALL = dataclasses.replace(
    EdgeConformerConfig.tiny(),
    vocab_size=5,
    num_mels=11,
    width=8,
    num_layers=2,
    num_heads=2,
    ffn_width=12,
    conv_kernel=5,
    chunk=2,
    left=1,
    lpa=LPAConfig(aperiodic=0, runs=1, periodic=1, positional=0, mean=1, kernel_size=3),
)
call = nnx.jit(lambda model, x, lengths, chunks=None: model(x, lengths, chunks))


def make(scale=0.3, **changes):
    model = EdgeConformer(dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(0))
    return randomize(model, scale=scale)


def audio(batch, t, seed=0):
    return (0.1 * np.random.default_rng(seed).normal(size=(batch, t))).astype(np.float32)


@pytest.mark.parametrize("mixer", ["attention", "lpa"])
def test_streaming_contract(mixer):
    if mixer == "attention":
        model, frames = make(), 2
    else:
        model, frames = make(mixer=mixer, conv_reach="causal", num_layers=1), 1
    assert model.chunk == frames * 640
    out, lengths = verify_streaming_contract(
        model, audio, length=640 * 6 + 100, atol=1e-4, gradient_atol=1e-4
    )
    np.testing.assert_array_equal(lengths, [6, 4, 2, 0])
    assert np.ptp(out[0], axis=0).min() > 0.01


def test_matches_the_equations():
    model, x = make(), audio(2, 640 * 7)
    w = reference.parameters(model)
    lengths = np.array([640 * 7, 640 * 4 + 11])
    logits, frames = call(model, x, lengths)
    np.testing.assert_array_equal(frames, [7, 4])
    part = reference.part
    for row, (t, n) in enumerate(zip(lengths, frames, strict=True)):
        samples = np.concatenate([np.zeros(240), np.float64(x[row, :t])])
        y = running_norm(reference.log_mel(samples, 11))
        y = np.concatenate([np.zeros((3, 11)), y])[..., None]
        sub = part(w, "subsampling")
        y = np.maximum(reference.conv2d(y, sub["first"], 2) + sub["first_bias"], 0)
        y = reference.conv2d(reference.conv2d(y, sub["second"], 2), sub["pointwise"], 1)
        y = np.maximum(y + sub["second_bias"], 0)
        y = reference.linear(part(sub, "projection"), y.reshape(len(y), -1))
        assert len(y) == n
        for layer in range(2):
            y = layer_by_loops(part(w, f"layers.{layer}"), y, SMALL.chunk, SMALL.left)
        want = reference.linear(part(w, "head"), y)
        np.testing.assert_allclose(logits[row, :n], want, atol=5e-4)


def test_one_program_serves_every_latency():
    """What the call is told equals what `set_chunks` sets, and is not compiled anew."""
    model, x, lengths = make(), audio(1, 640 * 9), np.array([640 * 9])
    traces = []

    @nnx.jit
    def run(model, chunks):
        traces.append(chunks)
        return model(x, lengths, chunks).logits

    outputs = []
    for size, left in ((2, 1), (3, 0), (3, 2), FULL_CONTEXT):
        outputs.append(run(model, Chunks(jnp.int32(size), jnp.int32(left))))
        if (size, left) == (3, 2):
            set_up = make()
            set_up.set_chunks(size, left)
            want = call(set_up, x, lengths).logits
            np.testing.assert_allclose(outputs[-1], want, atol=1e-5)
    assert len(traces) == 1
    for a, b in itertools.pairwise(outputs):
        assert np.abs(a - b).max() > 1e-2
    with pytest.raises(InputError, match="size 0 and left 1"):
        model.set_chunks(0, 1)


def test_chunks_of_training():
    config = dataclasses.replace(
        SMALL, train_chunks=(3, 5, 7), train_left=(0, 2), full_context=0.25
    )
    keys = jax.random.split(jax.random.key(0), 2000)
    sizes, lefts = (np.asarray(a) for a in jax.vmap(lambda k: draw_chunks(k, config))(keys))
    is_full = sizes == FULL_CONTEXT.size
    assert is_full.mean() == pytest.approx(0.25, abs=0.04)
    assert set(lefts[is_full]) == {FULL_CONTEXT.left}
    for values, choices in ((sizes[~is_full], (3, 5, 7)), (lefts[~is_full], (0, 2))):
        assert set(values) == set(choices)
        for choice in choices:
            assert (values == choice).mean() == pytest.approx(1 / len(choices), abs=0.05)


def ctc_by_paths(log_probs, target):
    """`-log p(target)` by the forward recursion over blanks and tokens."""
    states = [0]
    for token in target:
        states += [token, 0]
    alpha = np.full(len(states), -np.inf)
    alpha[:2] = log_probs[0, states[:2]]
    for frame in log_probs[1:]:
        new = np.empty_like(alpha)
        for s, token in enumerate(states):
            total = alpha[s]
            if s >= 1:
                total = np.logaddexp(total, alpha[s - 1])
            if s >= 2 and token not in (0, states[s - 2]):
                total = np.logaddexp(total, alpha[s - 2])
            new[s] = total + frame[token]
        alpha = new
    return -np.logaddexp(alpha[-1], alpha[-2])


def log_softmax(x):
    x = np.float64(x)
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


BATCH = Batch(
    audio=audio(3, 640 * 8),
    audio_lengths=np.array([640 * 8, 640 * 6, 640 * 5]),
    targets=np.array([[1, 1, 4], [3, 2, 2], [4, 4, 4]]),
    target_lengths=np.array([3, 2, 3]),
    weights=np.array([1.0, 1.0, 0.0], np.float32),
    index=np.array([0, 1, -1]),
)


def make_for_loss(**changes):
    """Without what is random in training."""
    quiet = dataclasses.replace(SMALL.spec_augment, frequency_masks=0, max_time_masks=0)
    sure = {"full_context": 0.0, "train_chunks": (2,), "train_left": (1,), "spec_augment": quiet}
    return make(**sure, **changes)


def objective(model, num_steps=10):
    graphdef, params, other = nnx.split(model, nnx.Param, ...)
    loss = jax.jit(multitask_objective(graphdef, other, num_steps))
    return lambda batch, step: loss(params, batch, jax.random.key(0), jnp.int32(step))


def test_multitask_loss():
    model, batch = make_for_loss(ctc_weight=0.3), BATCH
    loss = objective(model)
    got, metrics = loss(batch, 0)

    memory, frames = nnx.jit(lambda m: m.encode(batch.audio, batch.audio_lengths))(model)
    ctc, decoder = [], []
    for row in range(2):
        target = batch.targets[row, : batch.target_lengths[row]]
        logits = model.head(memory)[row, : frames[row]]
        ctc.append(ctc_by_paths(log_softmax(logits), target) / len(target))
        before = np.concatenate([[0], target])[None]
        after = np.concatenate([target, [0]])
        logits = model.decoder(
            before, np.array([before.size]), memory[row : row + 1], frames[row : row + 1]
        )
        picked = log_softmax(logits[0])[np.arange(len(after)), after]
        decoder.append(-picked.sum() / len(after))
    np.testing.assert_allclose(metrics["ctc"], np.mean(ctc), rtol=1e-5)
    np.testing.assert_allclose(metrics["decoder"], np.mean(decoder), rtol=1e-5)
    np.testing.assert_allclose(got, 0.3 * np.mean(ctc) + 0.7 * np.mean(decoder), rtol=1e-5)
    spoiled = batch._replace(audio=batch.audio.copy(), targets=batch.targets.copy())
    spoiled.audio[2], spoiled.targets[1, 2] = np.nan, 4  # a filler row, and behind a target's end
    again, _ = loss(spoiled, 0)
    np.testing.assert_array_equal(again, got)


def test_lpa_anneals_and_ends_hard():
    model = make_for_loss(mixer="lpa", num_layers=1)
    loss = objective(model)
    losses = [float(loss(BATCH, step)[1]["ctc"]) for step in (0, 3, 7, 10)]
    assert losses[2] == losses[3]
    assert len(set(losses)) == 3
    logits, frames = call(harden(model), BATCH.audio, BATCH.audio_lengths)
    want = [
        ctc_by_paths(log_softmax(logits[row, :n]), BATCH.targets[row, :u]) / u
        for row, (n, u) in enumerate(zip(frames[:2], BATCH.target_lengths[:2], strict=True))
    ]
    np.testing.assert_allclose(losses[-1], np.mean(want), rtol=1e-5)


def test_training_is_random_by_its_key():
    model = make(dropout=0.2)
    run = nnx.jit(lambda m, x, key: m(x, np.array([640 * 6]), None, key).logits)
    a, b, c = (run(model, audio(1, 640 * 6), jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.05


@pytest.mark.parametrize(
    ("norm", "mixer", "num_layers"), [("layer", "lpa", 1), ("lp", "attention", 2)]
)
def test_float16_is_close_to_float32(norm, mixer, num_layers):
    """Parameters as initialised, 1.2 s of noise with a loud half."""
    x, lengths = audio(2, 640 * 30), np.array([640 * 30, 640 * 17])
    x[:, 640 * 15 :] *= 8.0
    outputs = {}
    for dtype in ("float32", "float16"):
        sizes = {"width": 32, "num_layers": num_layers, "num_mels": 20, "chunk": 4}
        model = make(scale=0.0, norm=norm, mixer=mixer, dtype=dtype, **sizes)
        outputs[dtype] = call(model, x, lengths).logits
        leaves = jax.tree.leaves(model.init_state(1).layers[0].conv)
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
    assert outputs["float16"].dtype == jnp.float16
    difference = np.abs(np.float32(outputs["float16"]) - outputs["float32"])
    assert difference.max() < 1e-2
    assert np.abs(outputs["float32"]).max() > 0.5


def test_bad_settings():
    for changes, message in (
        ({"width": 9}, "num_heads is 2: it must be such that model.width 9"),
        ({"num_heads": 8}, "num_heads is 8"),
        ({"conv_kernel": 4}, "conv_kernel is 4: it must be odd"),
        ({"mixer": "mean"}, "'mean': it must be one of attention, lpa"),
        ({"dtype": "float8"}, "'float8': it must be one of float32, bfloat16, float16"),
        ({"norm": "batch"}, "'batch': it must be one of layer, lp"),
        ({"left": -1}, "left is -1: it must be at least 0"),
        ({"chunk": 0}, "chunk is 0: it must be at least 1"),
        ({"train_chunks": ()}, "sizes from 1 on"),
        ({"ctc_weight": 1.5}, r"ctc_weight is 1.5: it must be in \[0, 1\]"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(SMALL, **changes)
    with pytest.raises(InputError, match="audio of 639 samples is too short"):
        make()(audio(1, 639), np.array([639]))
