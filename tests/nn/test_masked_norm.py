"""Norms over valid frames: NumPy over the valid frames alone, running statistics, filler."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.masked_norm import MaskedNorm
from tests.support.contracts import padding_contract
from tests.support.modules import randomize

D = 4
LENGTHS = np.array([7, 1, 4, 2])
MASK = np.arange(7) < LENGTHS[:, None]
call = nnx.jit(lambda norm, x, mask, training: norm(x, mask, training), static_argnums=3)


def inputs():
    return np.random.default_rng(0).normal(1.0, 2.0, size=(4, 7, D))


def make(kind):
    norm = randomize(MaskedNorm(D, kind))
    if kind == "batch":
        norm.running_mean[...] = jnp.array([0.1, -0.2, 0.3, 0.4])
        norm.running_variance[...] = jnp.array([0.5, 1.5, 1.0, 2.0])
    return norm


def affine(norm, x, mean, variance):
    scale, bias = np.float64(norm.scale[...]), np.float64(norm.bias[...])
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + bias


@pytest.mark.parametrize("kind", ["batch", "group", "layer"])
def test_inference(kind):
    norm, x = make(kind), inputs()

    def run(x, lengths):
        return call(norm, x, np.arange(x.shape[1]) < np.asarray(lengths)[:, None], False)

    out = padding_contract(run, np.float32(x), LENGTHS)
    for row, n in enumerate(LENGTHS):
        own = x[row, :n]
        if kind == "batch":
            mean, variance = np.float64(norm.running_mean), np.float64(norm.running_variance)
        elif kind == "group":
            mean, variance = own.mean(), own.var()
        else:
            mean, variance = own.mean(-1, keepdims=True), own.var(-1, keepdims=True)
        np.testing.assert_allclose(out[row, :n], affine(norm, own, mean, variance), atol=1e-5)


def test_batch_norm_in_training():
    norm, x = make("batch"), inputs()
    mean, variance = np.float64(norm.running_mean), np.float64(norm.running_variance)
    out = call(norm, np.where(MASK[..., None], x, np.nan).astype(np.float32), MASK, True)
    valid = x[MASK]
    want = affine(norm, valid, valid.mean(0), valid.var(0))
    np.testing.assert_allclose(np.asarray(out)[MASK], want, atol=1e-5)
    np.testing.assert_allclose(norm.running_mean, 0.9 * mean + 0.1 * valid.mean(0), rtol=1e-5)
    unbiased = valid.var(0, ddof=1)
    np.testing.assert_allclose(norm.running_variance, 0.9 * variance + 0.1 * unbiased, rtol=1e-5)


def test_filler_alone_moves_nothing():
    norm = make("batch")
    before = np.asarray(norm.running_mean), np.asarray(norm.running_variance)
    call(norm, np.full((2, 3, D), np.nan, np.float32), np.zeros((2, 3), bool), True)
    np.testing.assert_array_equal(norm.running_mean, before[0])
    np.testing.assert_array_equal(norm.running_variance, before[1])


def test_running_statistics_are_not_trained():
    names = {
        path[-1] for path, _ in nnx.to_flat_state(nnx.state(MaskedNorm(D, "batch"), nnx.Param))
    }
    assert names == {"scale", "bias"}


def test_kind_is_named():
    with pytest.raises(InputError, match=r"'instance'.*batch, group, layer"):
        MaskedNorm(D, "instance")
