"""Rotary positions: complex numbers in float64, and what they are for."""

import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.ops.rotary import rotate

RNG = np.random.default_rng(0)


def rotate_complex(x, positions, width, base):
    """`[n h c]` in float64: each pair of channels is one complex number."""
    y = np.array(x, np.float64)
    for i in range(width // 2):
        turn = np.exp(1j * positions * base ** (-2 * i / width))[:, None]
        pair = (x[..., 2 * i] + 1j * x[..., 2 * i + 1]) * turn
        y[..., 2 * i], y[..., 2 * i + 1] = pair.real, pair.imag
    return y


@pytest.mark.parametrize(("width", "base"), [(2, 10_000.0), (6, 10_000.0), (8, 100.0)])
def test_is_a_turn_of_complex_numbers(width, base):
    x = RNG.normal(size=(2, 5, 3, 8))
    positions = np.array([0, 1, 7, 400, 1200])
    y = np.asarray(rotate(jnp.float32(x), jnp.array(positions), width, base))
    for row in range(2):
        wanted = rotate_complex(x[row], positions, width, base)
        np.testing.assert_allclose(y[row], wanted, atol=5e-4)  # angles up to 1200 in float32
    np.testing.assert_array_equal(y[..., width:], np.float32(x)[..., width:])
    np.testing.assert_array_equal(y[:, 0], np.float32(x)[:, 0])


def test_products_depend_on_the_distance_alone():
    q, k = np.float32(RNG.normal(size=(2, 1, 1, 1, 8)))
    products = [
        float(jnp.sum(rotate(q, jnp.array([i + 3]), 6) * rotate(k, jnp.array([i]), 6)))
        for i in (0, 5, 50)
    ]
    np.testing.assert_allclose(products, products[0], atol=1e-5)
    back = float(jnp.sum(rotate(q, jnp.array([0]), 6) * rotate(k, jnp.array([3]), 6)))
    assert abs(back - products[0]) > 0.1


def test_keeps_the_dtype_and_turns_in_float32():
    x = jnp.asarray(RNG.normal(size=(1, 1, 1, 4)), jnp.bfloat16)
    y = rotate(x, jnp.array([1001]), 4)
    assert y.dtype == jnp.bfloat16
    wanted = rotate_complex(np.float64(x[0]), np.array([1001]), 4, 10_000.0)
    np.testing.assert_allclose(np.float64(y[0]), wanted, atol=0.02)
