"""Convolutions against loops, and the custom gradient against XLA's and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.ops.conv import (
    conv1d,
    conv2d,
    conv2d_reference,
    conv_length,
    depthwise_conv,
    depthwise_conv_reference,
    grouped_conv1d,
)
from edgespeech.ops.mask import mask_from_lengths
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.gradients import assert_gradient

RNG = np.random.default_rng(0)
conv1d_jit = jax.jit(conv1d, static_argnums=(2, 3))


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (10, 5), (3, 2), (2, 2), (400, 160)])
def test_conv_length_counts_the_windows_that_fit(kernel, stride):
    for n in (0, 1, kernel - 1, kernel, kernel + stride, 7 * kernel + stride - 1):
        count = sum(start + kernel <= n for start in range(0, n + 1, stride))
        assert conv_length(n, kernel, stride) == count
        assert int(conv_length(jnp.array([n]), kernel, stride)[0]) == count


@pytest.mark.parametrize(
    ("n", "k", "stride", "groups"), [(9, 3, 1, 1), (10, 4, 3, 1), (8, 3, 2, 2), (6, 2, 1, 4)]
)
def test_conv1d(n, k, stride, groups):
    x, kernel = RNG.normal(size=(2, n, 4)), RNG.normal(size=(k, 4 // groups, 8))
    got = conv1d_jit(np.float32(x), np.float32(kernel), stride, groups)
    want = np.stack([reference.conv(row, kernel, stride, groups) for row in x])
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(("n", "k", "groups"), [(9, 3, 1), (12, 4, 2), (6, 6, 4), (7, 1, 2)])
def test_grouped_conv1d_and_its_gradients(n, k, groups):
    x, kernel = RNG.normal(size=(2, n, 4)), RNG.normal(size=(k, 4 // groups, 8))
    want = np.stack([reference.conv(row, kernel, 1, groups) for row in x])
    x, kernel = np.float32(x), np.float32(kernel)
    got, vjp = jax.vjp(lambda x, kernel: grouped_conv1d(x, kernel, groups), x, kernel)
    np.testing.assert_allclose(got, want, atol=1e-5)
    weight = np.float32(RNG.normal(size=want.shape))
    _, other = jax.vjp(lambda x, kernel: conv1d(x, kernel, groups=groups), x, kernel)
    for gradient, plain in zip(vjp(weight), other(weight), strict=True):
        np.testing.assert_allclose(gradient, plain, atol=2e-5)
    low = jax.vjp(lambda x, k: grouped_conv1d(x, k, groups), jnp.bfloat16(x), kernel)[1]
    assert [g.dtype for g in low(jnp.bfloat16(weight))] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("channels", "groups"), [(4, 4), (4, 1), (1, 1)])
def test_conv2d_and_its_gradients(channels, groups, stride):
    x = np.float32(RNG.normal(size=(2, 9, 8, channels)))
    kernel = np.float32(RNG.normal(size=(3, 2, channels // groups, 4)))
    got, vjp = jax.vjp(lambda x, kernel: conv2d(x, kernel, stride), x, kernel)
    want = np.stack([reference.conv2d(row, kernel, stride) for row in x])
    np.testing.assert_allclose(got, want, atol=1e-5)
    weight = np.float32(RNG.normal(size=want.shape))
    _, other = jax.vjp(lambda x, kernel: conv2d_reference(x, kernel, stride), x, kernel)
    for gradient, plain in zip(vjp(weight), other(weight), strict=True):
        np.testing.assert_allclose(gradient, plain, atol=2e-5)


def test_conv1d_of_too_short_a_signal_is_empty():
    assert conv1d(jnp.ones((2, 3, 1)), jnp.ones((10, 1, 4)), 5).shape == (2, 0, 4)


# Lengths around the blocks of 16 frames in which the kernel's gradient is summed.
SHAPES = [(1, 1), (1, 5), (4, 15), (16, 3), (17, 4), (37, 31)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_depthwise_conv_and_its_gradients(n, k, causal):
    x, kernel = RNG.normal(size=(2, n, 3)), RNG.normal(size=(k, 3))
    lengths = [n, max(1, n - 3)]
    mask = mask_from_lengths(jnp.array(lengths), n)
    weight = np.float32(RNG.normal(size=x.shape))

    @jax.jit
    def both(x, kernel):
        def value_and_gradients(function):
            out, vjp = jax.vjp(lambda x, kernel: function(x, kernel, mask, causal), x, kernel)
            return out, vjp(weight)

        return value_and_gradients(depthwise_conv), value_and_gradients(depthwise_conv_reference)

    (got, got_grads), (other, other_grads) = both(np.float32(x), np.float32(kernel))
    valid = np.asarray(mask)[..., None]
    want = np.stack([reference.depthwise_conv(row, kernel, causal) for row in x * valid])
    np.testing.assert_allclose(got, want, atol=2e-5)
    np.testing.assert_allclose(got, other, atol=2e-5)
    for a, b in zip(got_grads, other_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_depthwise_conv_gradient_against_finite_differences(causal):
    assert_gradient(
        lambda x, kernel: depthwise_conv(x[None], kernel, causal=causal)[0],
        lambda x, kernel: reference.depthwise_conv(x, kernel, causal),
        [RNG.normal(size=(19, 2)), RNG.normal(size=(5, 2))],
    )


def test_causal_kernel_does_not_see_the_future():
    x = jnp.zeros((1, 9, 1)).at[0, 4].set(1.0)
    kernel = jnp.array([[1.0], [2.0], [3.0]])  # tap 0 meets the oldest frame
    causal, centred = depthwise_conv(x, kernel, causal=True), depthwise_conv(x, kernel)
    np.testing.assert_array_equal(causal.ravel(), [0, 0, 0, 0, 3, 2, 1, 0, 0])
    np.testing.assert_array_equal(centred.ravel(), [0, 0, 0, 3, 2, 1, 0, 0, 0])


def test_padding_counts_as_zero():
    kernel = np.float32(RNG.normal(size=(7, 3)))

    @jax.jit
    def call(x, lengths):
        return depthwise_conv(x, kernel, mask_from_lengths(lengths, x.shape[1]))

    padding_contract(call, np.float32(RNG.normal(size=(3, 12, 3))), [12, 5, 1])


def test_gradient_of_the_kernel_ignores_nan_in_the_padding():
    mask = mask_from_lengths(jnp.array([4]), 9)
    x = jnp.where(mask[..., None], np.float32(RNG.normal(size=(1, 9, 2))), jnp.nan)

    def loss(kernel, x):
        return jnp.sum(jnp.where(mask[..., None], depthwise_conv(x, kernel, mask), 0.0) ** 2)

    kernel = np.float32(RNG.normal(size=(3, 2)))
    got = jax.grad(loss)(kernel, x)
    np.testing.assert_array_equal(got, jax.grad(loss)(kernel, jnp.nan_to_num(x)))
    assert np.abs(got).min() > 0


def test_low_precision_keeps_its_dtype():
    x = jnp.bfloat16(RNG.normal(size=(1, 20, 2)))
    kernel = np.float32(RNG.normal(size=(3, 2)))
    assert conv1d(x, jnp.ones((3, 2, 2))).dtype == jnp.bfloat16
    out, vjp = jax.vjp(depthwise_conv, x, kernel)
    assert out.dtype == jnp.bfloat16
    want = reference.depthwise_conv(np.float64(x[0]), np.float64(kernel))
    np.testing.assert_allclose(np.float64(out[0]), want, atol=0.06)
    assert [g.dtype for g in vjp(out)] == [jnp.bfloat16, jnp.float32]
