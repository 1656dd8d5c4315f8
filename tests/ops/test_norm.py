"""Lp layer normalisation against float64, its gradient against finite differences, and its bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.errors import InputError
from edgespeech.ops.norm import (
    PreNormalizer,
    largest_base,
    lp_normalize,
    lp_normalize_gradient_reference,
    lp_normalize_reference,
    pairwise_mean,
    range_constant,
    scale_shift,
)
from tests.support.gradients import assert_gradient, numeric_derivative

RNG = np.random.default_rng(0)
MAD, MAX_ABS, NONE = PreNormalizer
normalize = jax.jit(lp_normalize, static_argnums=(1, 2, 3))
mean = jax.jit(pairwise_mean)


def loops(x, p, eps):
    """One row at a time, from the definition."""
    rows = []
    for row in x:
        mu = sum(row) / len(row)
        norm = (sum(abs(v - mu) ** p for v in row) / len(row) + eps ** (p / 2)) ** (1 / p)
        rows.append([(v - mu) / norm for v in row])
    return np.array(rows)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("pre", [MAD, MAX_ABS, NONE])
def test_every_form_is_the_same_function(p, pre):
    x = 3 * RNG.normal(size=(4, 13)) + 5
    want = loops(x, p, 0.3)
    np.testing.assert_allclose(lp_normalize_reference(x, p, 0.3), want, rtol=1e-12)
    np.testing.assert_allclose(normalize(np.float32(x), p, 0.3, pre), want, atol=3e-6)


def test_is_layer_normalisation_for_p_2():
    x = np.float32(RNG.normal(size=(3, 37)) * 7 - 2)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(normalize(x), want, atol=2e-6)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("pre", [MAD, MAX_ABS])
def test_gradient_against_finite_differences(p, pre):
    assert_gradient(
        lambda x: lp_normalize(x, p, 0.05, pre),
        lambda x: lp_normalize_reference(x, p, 0.05),
        [RNG.normal(size=(3, 11))],
    )


@pytest.mark.parametrize("p", [1, 2, 3])
def test_gradient_reference_against_finite_differences(p):
    x, g, direction = RNG.normal(size=(3, 4, 9))
    want = numeric_derivative(
        lambda x: np.sum(g * lp_normalize_reference(x, p, 0.1)), [x], [direction]
    )
    got = np.sum(lp_normalize_gradient_reference(x, g, p, 0.1) * direction)
    assert abs(got - want) < 1e-7 * max(1.0, abs(want))


@pytest.mark.parametrize(
    ("dtype", "p", "largest"),
    [(jnp.float8_e4m3fn, 2, 288), (jnp.float16, 3, 2578), (jnp.float16, 4, 511)],
)
def test_largest_row_of_a_format(dtype, p, largest):
    def trace(n):
        jax.eval_shape(lambda x: lp_normalize(x, p), jax.ShapeDtypeStruct((n,), dtype))

    trace(largest)
    with pytest.raises(InputError, match=f"n = {largest + 1} elements with p = {p}"):
        trace(largest + 1)


def test_range_constant_of_float16():
    assert [range_constant(n, 2, jnp.float16) for n in (144, 511, 512, 1023, 1024, 2048)] == [
        *(1, 1, 2, 2, 4, 8),
    ]
    assert range_constant(4096, 2, jnp.float32) == range_constant(4096, 2, jnp.bfloat16) == 1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_range_constant_is_the_smallest_that_holds(dtype, p):
    base = largest_base(p, dtype)
    power = jnp.asarray(base, dtype)
    for _ in range(p - 1):
        power = power * jnp.asarray(base, dtype)
    assert np.isfinite(np.float64(power))
    above = base * (1 + 4 * p * float(jnp.finfo(dtype).eps))
    assert above**p > float(jnp.finfo(dtype).max)
    for n in (144, 511, 2048):
        c = range_constant(n, p, dtype)
        assert n / (2 * c) <= base
        assert c == 1 or n / c > base


def test_bounds_of_the_theory():
    """|z| <= n / (2c) and c^-p <= mean |z|^p <= (n/2)^(p-1) c^-p; one-hot and +-1 rows attain them."""
    n, c = 64, 4.0
    one_hot, signs = np.eye(n)[0], np.where(np.arange(n) % 2, 1.0, -1.0)
    heavy = RNG.standard_cauchy(size=(200, n))
    rows = np.vstack([one_hot, signs, heavy, RNG.normal(size=(50, n)), RNG.random((50, n)) ** 9])
    d = rows - rows.mean(-1, keepdims=True)
    z = d / (c * np.abs(d).mean(-1, keepdims=True))
    assert np.abs(z).max() <= n / (2 * c) * (1 + 1e-12)
    assert np.abs(z[0]).max() == pytest.approx(n / (2 * c))
    for p in (1, 2, 3, 4):
        mean = (np.abs(z) ** p).mean(-1)
        assert mean.min() >= c**-p * (1 - 1e-12)
        assert mean[1] == pytest.approx(c**-p)
        highest = (n / 2) ** (p - 1) * c**-p
        assert mean.max() <= highest * (1 + 1e-12)
        # A pair +-1 among zeros attains the upper bound.
        pair = np.zeros(n)
        pair[:2] = 1, -1
        assert (np.abs(pair / (c * 2 / n)) ** p).mean() == pytest.approx(highest)
        # With max-abs the spread is n / (1 + (n-1)^(1-p)), from one-hot rows to +-1.
        mean = (np.abs(d / np.abs(d).max(-1, keepdims=True)) ** p).mean(-1)
        assert mean.min() == pytest.approx(mean[0]) == pytest.approx((1 + (n - 1) ** (1 - p)) / n)
        assert mean.max() == pytest.approx(mean[1]) == 1.0


@pytest.mark.parametrize("n", [1, 2, 3, 7, 144, 511])
def test_pairwise_mean(n):
    x = RNG.normal(size=(2, n))
    np.testing.assert_allclose(mean(jnp.float32(x)), x.mean(-1, keepdims=True), atol=3e-7)
    for value in (1e-7, 0.1, 333.0, 65504.0):
        same = jnp.full((1, n), value, jnp.float16)
        np.testing.assert_array_equal(mean(same), same[:, :1])


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5])
def test_a_constant_row_is_zero_and_a_single_element_too(eps):
    for value in (0.0, 1e-7, 7.0, 65504.0):
        for n in (1, 144):
            out = normalize(jnp.full((1, n), value, jnp.float16), 2, eps)
            np.testing.assert_array_equal(out, 0.0)


def test_two_largest_powers_that_meet_in_the_mean():
    x = np.zeros((1, 510), np.float16)
    x[0, [3, 258]] = 6e4, -6e4  # z = +-255, c = 1: 65025 twice
    want = lp_normalize_reference(x)
    np.testing.assert_allclose(np.float64(normalize(x)), want, atol=4e-3 * np.abs(want).max())


def test_rows_do_not_meet():
    x = np.float16(RNG.normal(size=(2, 3, 20)))
    out = normalize(x)
    x[1, 2] = np.nan
    np.testing.assert_array_equal(
        np.delete(normalize(x).reshape(6, 20), 5, 0), out.reshape(6, 20)[:5]
    )


def test_without_pre_normaliser_float16_overflows():
    x = np.float16(np.where(RNG.random((1, 64)) > 0.5, 300, -300))
    want = lp_normalize_reference(x)
    assert not np.isfinite(normalize(x, 2, 1e-5, NONE)).any()
    np.testing.assert_allclose(np.float64(normalize(x, 2, 1e-5, MAD)), want, atol=2e-3)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_float8(dtype):
    top = float(jnp.finfo(dtype).max)
    signs = np.where(RNG.random(128) > 0.5, top, -top)
    rows = np.stack([RNG.normal(size=128), signs, top * np.eye(128)[3], np.zeros(128)])
    x = jnp.asarray(rows, dtype)
    y, vjp = jax.vjp(normalize, x)
    (dx,) = vjp(jnp.ones_like(x) * jnp.asarray(top, dtype))
    assert y.dtype == dx.dtype == dtype
    want = lp_normalize_reference(x)
    size = np.abs(want).max(-1, keepdims=True)
    unit = float(jnp.finfo(dtype).eps) / 2
    assert np.abs((np.float64(y) - want) / np.maximum(size, 1)).max() <= 8 * unit
    assert np.isfinite(np.float64(dx)).all()


def test_a_gradient_beyond_the_format_saturates():
    x = jnp.zeros((1, 16), jnp.float16).at[0, 0].set(1e-6)
    g = jnp.zeros((1, 16), jnp.float16).at[0, 3].set(60000.0)
    (dx,) = jax.vjp(normalize, x)[1](g)
    want = lp_normalize_gradient_reference(x, g)
    assert want[0, 3] > 1e7
    assert want[0, 5] < -1e6
    np.testing.assert_array_equal(dx[0, [3, 5]], [65504, -65504])


def test_scale_shift_sums_its_gradients_in_the_parameters_dtype():
    y = jnp.full((5000, 2), 3.0, jnp.float16)
    scale, bias = jnp.float32([2.0, -1.0]), jnp.float32([0.5, 0.25])
    out, vjp = jax.vjp(scale_shift, y, scale, bias)
    np.testing.assert_array_equal(out[0], [6.5, -2.75])
    dy, d_scale, d_bias = vjp(jnp.full_like(y, 7.0))
    assert (out.dtype, dy.dtype, d_scale.dtype) == (jnp.float16, jnp.float16, jnp.float32)
    np.testing.assert_array_equal(dy[0], [14, -7])
    np.testing.assert_array_equal(d_scale, 3 * 7 * 5000)
    np.testing.assert_array_equal(d_bias, 7 * 5000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.arange(4),), "int32: it needs a floating-point array"),
        ((jnp.ones((2, 0)),), "n = 0"),
        ((jnp.ones(4), 0), "p = 0"),
        ((jnp.ones(4), 1.5), r"p = 1\.5"),
        ((jnp.ones(4), 2, -1e-5), "eps = -1e-05"),
        ((jnp.ones(4), 2, 2.0), r"eps = 2\.0"),
        ((jnp.ones(2048, jnp.float8_e4m3fn),), "n = 2048 .* MAD and float8_e4m3fn: underflow"),
        ((jnp.ones(2048, jnp.float16), 4), "p = 4, MAD and float16: underflow .* MAX_ABS"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        lp_normalize(*arguments)
