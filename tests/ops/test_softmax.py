"""Low-precision softmax against float64, and the error bounds of clamp and table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.errors import InputError
from edgespeech.ops import softmax as kernels
from edgespeech.ops.softmax import exp_table, softmax_reference, table_error, table_exp
from tests.support.gradients import assert_gradient

RNG = np.random.default_rng(0)
softmax = jax.jit(kernels.softmax, static_argnames="domain")


def test_matches_the_definition():
    x = RNG.normal(size=(3, 17))
    want = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    np.testing.assert_allclose(softmax_reference(x), want, rtol=1e-12)
    np.testing.assert_allclose(softmax(jnp.float32(x)), want, atol=1e-7)


def test_is_not_the_softmax_of_rescaled_logits():
    x = np.array([[0.0, 40.0, 38.0]])
    y = softmax(jnp.float32(x))
    np.testing.assert_allclose(y, softmax_reference(x), atol=3e-7)
    assert np.abs(y - softmax_reference(x * 16 / 40)).max() > 0.1


def test_mask():
    x = RNG.normal(size=(2, 2, 9))
    mask = RNG.random((2, 1, 9)) > 0.4
    mask[1] = False
    spoiled = np.where(mask, x, np.nan)
    y = np.asarray(softmax(jnp.float32(spoiled), mask))
    np.testing.assert_allclose(y, softmax_reference(x, mask), atol=1e-7)
    np.testing.assert_array_equal(y[np.broadcast_to(~mask, y.shape)], 0.0)
    # As if the hidden positions were not there, the clamped ones of a finite mask included.
    kept = x[0][:, mask[0, 0]]
    np.testing.assert_allclose(y[0][:, mask[0, 0]], softmax_reference(kept), atol=1e-7)


@pytest.mark.parametrize("use_table", [False, True])
def test_gradient(use_table):
    table = exp_table(4096, 16.0, jnp.float32) if use_table else None
    mask = np.ones(13, bool)
    mask[[2, 7]] = False
    assert_gradient(
        lambda x: softmax(x, mask, table),
        lambda x: softmax_reference(x, mask),
        [RNG.normal(size=(3, 13))],
    )


def test_gradient_of_hidden_positions_is_zero():
    x, g = jnp.float32(RNG.normal(size=(2, 6)))
    mask = jnp.arange(6) < 4
    (dx,) = jax.vjp(lambda x: softmax(x, mask), x)[1](g)
    np.testing.assert_array_equal(dx[4:], 0.0)
    (alone,) = jax.vjp(softmax, x[:4])[1](g[:4])
    np.testing.assert_allclose(dx[:4], alone, atol=1e-7)


def test_large_gradients_stay_finite_in_float16():
    x, g = jnp.zeros((1, 512), jnp.float16), jnp.full((1, 512), 65504, jnp.float16)
    (dx,) = jax.vjp(softmax, x)[1](g)
    assert np.abs(np.float64(dx)).max() < 1.0
    (dx,) = jax.vjp(softmax, x)[1](g.at[0, :256].set(-65504))
    np.testing.assert_allclose(np.float64(dx[0, 300]), 65504 / 512, rtol=4e-3)


def test_clamping_stays_within_its_bound():
    n, domain = 64, 4.0
    rows = np.stack([np.r_[0.0, np.full(n - 1, -50.0)], 9 * RNG.normal(size=n), np.zeros(n)])
    want = softmax_reference(rows)
    error = np.abs(softmax(jnp.float32(rows), domain=domain) - want)
    bound = np.maximum(np.exp(-domain), n * np.exp(-domain) * want)
    assert (error <= bound + 1e-6).all()
    # The bound is near: the first row's peak loses n e^-D / (1 + n e^-D) of itself.
    excess = (n - 1) * np.exp(-domain)
    np.testing.assert_allclose(error[0, 0], excess / (1 + excess), rtol=1e-5)


@pytest.mark.parametrize("num_intervals", [16, 128])
def test_table_stays_within_its_bound(num_intervals):
    table = exp_table(num_intervals, 16.0, jnp.float32)
    t = np.linspace(-16, 0, 10_007)
    relative = np.float64(table_exp(jnp.float32(t), table)) / np.exp(t) - 1
    bound = table_error(num_intervals)
    assert relative.min() > -3e-6
    # The bound takes exp at the left end and its curvature at the right: e^h too much at most.
    h = 16 / num_intervals
    assert bound * np.exp(-h) < relative.max() <= bound + 3e-6
    x = 3 * RNG.normal(size=(20, 100))
    x = np.maximum(x, x.max(-1, keepdims=True) - 16)
    want = softmax_reference(x)
    error = np.abs(softmax(jnp.float32(x), table=table) / want - 1)
    assert error.max() <= bound + 3e-6


def test_table_at_its_nodes_and_ends():
    table = exp_table(32, 8.0, jnp.float32)
    nodes = -np.arange(33) / 4
    np.testing.assert_allclose(table, np.exp(nodes), rtol=1e-7)
    np.testing.assert_allclose(table_exp(jnp.float32(nodes), table, 8.0), np.exp(nodes), rtol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float8_e5m2, jnp.float8_e4m3fn])
def test_low_precision(dtype):
    top = float(jnp.finfo(dtype).max)
    rows = np.stack([RNG.normal(size=200), np.where(RNG.random(200) > 0.5, top, -top)])
    x = jnp.asarray(rows, dtype)
    for table in (None, exp_table(256, 16.0, dtype)):
        y = softmax(x, table=table)
        assert y.dtype == dtype
        want = softmax_reference(x)
        error = np.abs(np.float64(y) - want).max(-1) / want.max(-1)
        assert error.max() <= 8 * float(jnp.finfo(dtype).eps) / 2


def test_bad_input():
    with pytest.raises(InputError, match="int32: it needs a floating-point array"):
        softmax(jnp.arange(3))
    with pytest.raises(InputError, match="n = 449 in float8_e4m3fn, whose largest number is 448"):
        softmax(jnp.zeros(449, jnp.float8_e4m3fn))
    for arguments in ((0, 16.0), (8, 0.0)):
        with pytest.raises(InputError, match="at least one interval"):
            exp_table(*arguments)
