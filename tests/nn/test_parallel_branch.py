"""Downsampling by index, the branch from its parts, and what it may not see."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.conformer import ConformerLayer
from edgespeech.nn.parallel_branch import ParallelBranch, average_frames, half_lengths, slice_frames
from tests.nn.test_conformer import conformer_layer
from tests.support.contracts import padding_contract
from tests.support.modules import randomize

D = 8
LENGTHS = np.array([7, 4, 2, 1])
call = nnx.jit(lambda branch, u, h, lengths: branch(u, h, lengths))


def inputs(seed):
    return np.random.default_rng(seed).normal(size=(4, 7, D))


def make(downsample="slice", combine="sum"):
    layer = ConformerLayer(D, 2, 12, 3, dropout_rate=0.0, rngs=nnx.Rngs(0))
    return randomize(ParallelBranch(layer, D, downsample, combine))


def downsampled(x, weights):
    """One utterance: `w_0 x_2k + w_1 x_2k+1`, the last frame again where there is none."""
    n = len(x)
    return np.stack([weights[0] * x[k] + weights[1] * x[min(k + 1, n - 1)] for k in range(0, n, 2)])


def test_lengths():
    np.testing.assert_array_equal(half_lengths(jnp.arange(6)), [0, 1, 1, 2, 2, 3])


def test_slices_and_averages():
    x = inputs(0)
    sliced = np.asarray(slice_frames(jnp.float32(x)))
    assert sliced.shape == (4, 4, D)
    averaged = np.asarray(average_frames(jnp.float32(x), LENGTHS, jnp.array([0.3, 0.7])))
    assert averaged.shape == (4, 4, D)
    for row, n in enumerate(LENGTHS):
        own, half = x[row, :n], -(-n // 2)
        np.testing.assert_allclose(sliced[row, :half], downsampled(own, (1, 0)), rtol=1e-6)
        want = downsampled(own, (0.3, 0.7))
        np.testing.assert_allclose(averaged[row, :half], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("downsample", "combine"), [("slice", "sum"), ("mean", "sum"), ("softmax", "bypass")]
)
def test_branch(downsample, combine):
    branch = make(downsample, combine)
    h = np.float32(inputs(1))
    x = inputs(0)

    def run(both, lengths):
        return call(branch, both[..., :D], both[..., D:], lengths)

    both = np.concatenate([np.float32(x), h], axis=-1)
    out = padding_contract(run, both, LENGTHS, rows=(0, 3), atol=2e-5)
    weights = {"slice": (1, 0), "mean": (0.5, 0.5)}.get(downsample)
    if weights is None:
        weights = np.exp(np.float64(branch.weight_logits))
        weights = weights / weights.sum()
    for row, n in enumerate(LENGTHS):
        v = conformer_layer(branch.layer, downsampled(x[row, :n], weights))
        v = v[np.arange(n) // 2]
        want = h[row, :n] + v
        if combine == "bypass":
            c = np.clip(np.float64(branch.bypass_scale), 0, 1)
            want = (1 - c) * h[row, :n] + c * v
        np.testing.assert_allclose(out[row, :n], want, atol=5e-5)


def test_bypass_scale_stays_in_its_range():
    branch = make(combine="bypass")
    branch.bypass_scale[...] = jnp.full(D, -3.0)
    h = np.float32(inputs(1))
    np.testing.assert_array_equal(call(branch, np.float32(inputs(0)), h, LENGTHS), h)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("max", "sum"), "downsample is 'max'"), (("mean", "gate"), "combine is 'gate'")],
)
def test_choices_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        ParallelBranch(make().layer, D, *arguments)
