"""Subsampling by four against loops, and its contracts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.subsampling import StreamingSubsampling, Subsampling
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.modules import randomize
from tests.support.streaming import verify_streaming_contract

MELS, D = 12, 4
call = nnx.jit(lambda module, x, lengths: module(x, lengths))


def module(separable):
    return randomize(Subsampling(MELS, D, separable=separable, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("separable", [False, True])
def test_matches_the_equation_and_ignores_padding(separable):
    subsampling = module(separable)
    x = np.random.default_rng(1).normal(size=(4, 23, MELS))
    lengths = [23, 14, 7, 6]
    out = padding_contract(
        lambda x, n: call(subsampling, x, jnp.asarray(n))[0],
        np.float32(x),
        lengths,
        rows=(1, 2),
        out_length=Subsampling.num_frames,
    )
    _, new_lengths = call(subsampling, np.float32(x), jnp.array(lengths))
    np.testing.assert_array_equal(new_lengths, [5, 2, 1, 0])
    w = reference.parameters(subsampling)
    assert ("pointwise" in w) == separable
    for row, (n, frames) in enumerate(zip(lengths, (5, 2, 1, 0), strict=True)):
        y = np.maximum(reference.conv2d(x[row, :n, :, None], w["first"], 2) + w["first_bias"], 0)
        y = reference.conv2d(y, w["second"], 2)
        if separable:
            y = reference.conv2d(y, w["pointwise"], 1)
        y = np.maximum(y + w["second_bias"], 0)
        want = reference.linear(reference.part(w, "projection"), y.reshape(len(y), 2 * D))
        assert len(want) == frames
        np.testing.assert_allclose(out[row, :frames], want, atol=1e-4)
        np.testing.assert_array_equal(out[row, frames:], 0.0)


@pytest.mark.parametrize("separable", [False, True])
def test_gradient_ignores_nan_in_the_padding(separable):
    subsampling, lengths = module(separable), jnp.array([19, 8])
    x = np.float32(np.random.default_rng(2).normal(size=(2, 19, MELS)))
    spoiled = x.copy()
    spoiled[1, 8:] = np.nan

    @nnx.jit
    def gradient(subsampling, x):
        return nnx.grad(lambda m: jnp.sum(m(x, lengths)[0] ** 2))(subsampling)

    got, want = gradient(subsampling, spoiled), gradient(subsampling, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(np.asarray(b)).max() > 0


@pytest.mark.parametrize("separable", [False, True])
def test_streaming(separable):
    def features(batch, n):
        return np.random.default_rng(4).normal(size=(batch, n, MELS)).astype(np.float32)

    streaming = randomize(
        StreamingSubsampling(MELS, D, separable=separable, rngs=nnx.Rngs(0)), scale=1.0
    )
    out, frames = verify_streaming_contract(streaming, features, length=23)
    np.testing.assert_array_equal(frames, [5, 4, 1, 0])
    # The plain form, of the same parameters, with three zeros in front.
    plain = Subsampling(MELS, D, separable=separable, rngs=nnx.Rngs(1))
    nnx.update(plain, nnx.state(streaming))
    padded = np.pad(features(4, 23), ((0, 0), (3, 0), (0, 0)))
    want, frames = call(plain, padded, jnp.array([26, 19, 10, 3]))
    np.testing.assert_array_equal(frames, [5, 4, 1, 0])
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_low_precision_keeps_its_dtype():
    subsampling = module(separable=True)
    x = jnp.float16(np.random.default_rng(3).normal(size=(1, 15, MELS)))
    low = Subsampling(MELS, D, separable=True, rngs=nnx.Rngs(0))
    nnx.update(low, jax.tree.map(jnp.float16, nnx.state(subsampling)))
    out, _ = low(x, jnp.array([15]))
    assert out.dtype == jnp.float16
    want, _ = subsampling(x.astype(jnp.float32), jnp.array([15]))
    np.testing.assert_allclose(np.float32(out), want, atol=2e-2)


def test_bad_input():
    with pytest.raises(InputError, match="num_mels is 6: it must be at least 7"):
        Subsampling(6, 4, separable=False, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="features of 6 frames are too short"):
        module(separable=False)(jnp.zeros((1, 6, MELS)), jnp.array([6]))
