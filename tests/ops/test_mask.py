"""Masks against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.ops.mask import mask_from_lengths, masked_mean, zero_padding


def test_mask_is_true_below_each_length():
    got = mask_from_lengths(jnp.array([0, 3, 5, 9]), 5)
    assert got.dtype == jnp.bool_
    want = [[i < length for i in range(5)] for length in (0, 3, 5, 9)]
    np.testing.assert_array_equal(got, want)


def test_zero_padding_stops_nan_forward_and_backward():
    x = jnp.array([[[1.0, 2.0], [3.0, 4.0], [jnp.nan, jnp.inf]]])
    mask = jnp.array([[True, True, False]])
    np.testing.assert_array_equal(zero_padding(x, mask), [[[1, 2], [3, 4], [0, 0]]])
    grad = jax.grad(lambda x: jnp.sum(zero_padding(x, mask) ** 2))(x)
    np.testing.assert_array_equal(grad, [[[2, 4], [6, 8], [0, 0]]])
    assert zero_padding(x.astype(jnp.bfloat16), mask).dtype == jnp.bfloat16


@pytest.mark.parametrize("axis", [1, 2, (1, 2)])
def test_masked_mean(axis):
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(2, 5, 3)), rng.random((2, 5, 3)) < 0.6
    mask[1] = False  # nothing valid: the mean is 0
    total, count = (x * mask).sum(axis, keepdims=True), mask.sum(axis, keepdims=True)
    spoiled = jnp.float32(np.where(mask, x, np.nan))
    np.testing.assert_allclose(
        masked_mean(spoiled, jnp.array(mask), axis), total / np.maximum(count, 1), atol=1e-6
    )


def test_masked_mean_broadcasts_its_mask():
    x = jnp.arange(12.0).reshape(1, 4, 3)
    got = masked_mean(x, jnp.array([[True, True, False, False]])[..., None], axis=1)
    np.testing.assert_array_equal(got, [[[1.5, 2.5, 3.5]]])


def test_masked_mean_sums_low_precision_in_float32():
    # In bfloat16 a running sum of ones stops at 256.
    x = jnp.ones((1, 4000), jnp.bfloat16)
    got = masked_mean(x, jnp.ones((1, 4000), bool), axis=1)
    assert got.dtype == jnp.float32
    assert float(got[0, 0]) == 1.0
