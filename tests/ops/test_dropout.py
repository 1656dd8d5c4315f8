"""Dropout's random bits: their rate, their independence, their dependence on the key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.ops.dropout import dropout

SHAPE = (400, 300)
jitted = jax.jit(dropout, static_argnums=1)


def kept(rate, seed, shape=SHAPE):
    return np.asarray(jitted(jnp.ones(shape), rate, jax.random.key(seed)) != 0)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_share_of_kept_elements(rate):
    share = kept(rate, 0).mean()
    deviation = (rate * (1 - rate) / np.prod(SHAPE)) ** 0.5
    assert abs(share - (1 - rate)) < 5 * deviation


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_and_columns_are_each_at_the_rate(seed):
    keep, rate = kept(0.3, seed), 0.3
    for axis, n in ((0, SHAPE[0]), (1, SHAPE[1])):
        deviation = (rate * (1 - rate) / n) ** 0.5
        assert np.abs(keep.mean(axis) - 0.7).max() < 5 * deviation
        # The spread over rows is binomial: neither alike nor clustered.
        assert 0.85 < keep.mean(axis).std() / deviation < 1.15


def correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return (a * b).mean() / (a.std() * b.std())


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbours_are_independent(rate):
    keep = kept(rate, 2)
    for lag in (1, 2, 3, 4, 8, 16, 64, 128, SHAPE[1], 256, 1024):
        flat = keep.ravel()
        a, b = flat[:-lag], flat[lag:]
        assert abs(correlation(a, b)) < 5 / a.size**0.5, lag


def test_keys_are_independent_even_when_they_differ_by_one():
    masks = [kept(0.5, seed) for seed in range(4)]
    masks += [
        np.asarray(jitted(jnp.ones(SHAPE), 0.5, k) != 0)
        for k in jax.random.split(jax.random.key(0), 3)
    ]
    bound = 5 / np.prod(SHAPE) ** 0.5
    for i, a in enumerate(masks):
        for b in masks[i + 1 :]:
            assert abs(correlation(a, b)) < bound
            # Nor is one the other, shifted.
            assert abs(correlation(a.ravel()[1:], b.ravel()[:-1])) < bound


def test_kept_elements_are_scaled_and_others_are_zero():
    x = jax.random.normal(jax.random.key(0), SHAPE)
    out = np.asarray(jitted(x, 0.2, jax.random.key(3)))
    keep = kept(0.2, 3)
    np.testing.assert_allclose(out[keep], np.asarray(x)[keep] / 0.8, rtol=1e-6)
    np.testing.assert_array_equal(out[~keep], 0.0)


def test_same_key_same_mask_inside_and_outside_jit():
    x = jnp.ones((7, 5))
    a, b = (np.asarray(f(x, 0.5, jax.random.key(4))) for f in (dropout, jitted))
    np.testing.assert_array_equal(a, b)


def test_gradient_passes_where_the_value_does():
    x, key = jax.random.normal(jax.random.key(0), (20, 20)), jax.random.key(5)
    grad = jax.grad(lambda x: dropout(x, 0.25, key).sum())(x)
    np.testing.assert_allclose(grad, kept(0.25, 5, (20, 20)) / 0.75, rtol=1e-6)


def test_without_key_or_rate_it_is_the_identity():
    x = jax.random.normal(jax.random.key(0), (4, 3))
    np.testing.assert_array_equal(dropout(x, 0.5, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)), x)


def test_nan_that_is_dropped_is_gone_and_dtype_stays():
    key = jax.random.key(6)
    out = dropout(jnp.full((64,), jnp.nan, jnp.bfloat16), 0.5, key)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.isnan(np.float32(out)), kept(0.5, 6, (64,)))
