"""Pulse gates against float64 loops, their gradients against finite differences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.ops import pulse
from edgespeech.ops.mask import mask_from_lengths

H, P = 2, 3
KINDS = ("rectangle", "run", "periodic", "positional")


def make(kind, lengths, n, seed=0):
    """Arguments of a kind: (float64 arrays to differentiate), and functions for both forms."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, np.int32)
    b = len(lengths)
    mask = np.arange(n)[None] < lengths[:, None]
    as32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    if kind == "rectangle":
        last = lengths[:, None, None] - 1
        params = (rng.uniform(0, 1, (b, H, P)) * last, rng.uniform(2, 2 + 0.6 * n, (b, H, P)))
        fast = lambda p, tau, hard: pulse.rectangle_gates(*map(as32, p), jnp.array(mask), tau, hard)  # noqa: E731
        slow = lambda p, tau, hard: pulse.rectangle_gates_reference(*p, mask, tau, hard)  # noqa: E731
    elif kind == "run":
        params = (rng.normal(size=(b, H, P, n)),)
        fast = lambda p, tau, hard: pulse.run_gates(as32(p[0]), jnp.array(mask), tau, hard)  # noqa: E731
        slow = lambda p, tau, hard: pulse.run_gates_reference(p[0], mask, tau, hard)  # noqa: E731
    elif kind == "periodic":
        period = pulse.log_spaced_periods(H, P, 64.0)
        params = (rng.uniform(-1, 2, (H, P)), rng.uniform(0.1, 0.9, (H, P)))
        fast = lambda p, tau, hard: pulse.periodic_gates(  # noqa: E731
            period, *map(as32, p), jnp.array(mask), tau, hard
        )
        slow = lambda p, tau, hard: pulse.periodic_gates_reference(period, *p, mask, tau, hard)  # noqa: E731
    else:
        params = (rng.normal(size=(H, P, 5)), rng.normal(size=(H, P)))
        fast = lambda p, tau, hard: pulse.positional_gates(  # noqa: E731
            *map(as32, p), jnp.array(lengths), n, tau, hard
        )
        slow = lambda p, tau, hard: pulse.positional_gates_reference(*p, lengths, n, tau, hard)  # noqa: E731
    # Rounded to float32 first: both forms must see the same numbers.
    return tuple(np.float64(np.float32(p)) for p in params), fast, slow


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "lengths"), [(1, [1]), (2, [2, 1]), (7, [7, 1, 4]), (75, [75, 30]), (400, [399])]
)
def test_matches_reference(kind, n, lengths):
    params, fast, slow = make(kind, lengths, n)
    fast = jax.jit(fast)
    for tau, hard in ((1.0, 0.0), (8.0, 0.5), (0.25, 0.25), (1.0, 1.0)):
        gates = np.asarray(fast(params, tau, hard))
        assert gates.dtype == np.float32
        np.testing.assert_allclose(gates, slow(params, tau, hard), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 7, 75])
def test_hard_is_binary_and_the_same_by_every_route(kind, n):
    params, fast, slow = make(kind, [n, max(1, n // 2)], n, seed=1)
    static = fast(params, 1.0, True)
    assert static.dtype == jnp.bool_
    traced = fast(params, 0.3, 1.0)
    np.testing.assert_array_equal(np.asarray(traced), np.asarray(static, np.float32))
    np.testing.assert_array_equal(jax.jit(fast)(params, 0.3, jnp.float32(1.0)), traced)
    np.testing.assert_array_equal(np.asarray(traced), slow(params, 1.0, 1.0))
    if n == 75:
        assert 0 < static.sum() < 0.9 * static.size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [8.0, 1.0, 0.25])
def test_gradient_matches_finite_differences(kind, tau):
    n = 9
    params, fast, slow = make(kind, [n, 5], n, seed=2)
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(2, H, P, n))
    direction = tuple(rng.normal(size=p.shape) for p in params)

    def loss(params, hard):
        return jnp.sum(jnp.asarray(weight, jnp.float32) * fast(params, tau, hard))

    as32 = tuple(jnp.asarray(p, jnp.float32) for p in params)
    gradient = jax.jit(jax.grad(loss))
    grads = gradient(as32, 0.0)
    got = sum(np.sum(np.float64(g) * d) for g, d in zip(grads, direction, strict=True))
    eps = 1e-5
    ends = [
        np.sum(
            weight
            * slow(tuple(p + s * eps * d for p, d in zip(params, direction, strict=True)), tau, 0.0)
        )
        for s in (1, -1)
    ]
    want = (ends[0] - ends[1]) / (2 * eps)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)
    # Straight through: the binary value keeps the soft gradient.
    for soft, hard in zip(grads, gradient(as32, 1.0), strict=True):
        np.testing.assert_array_equal(soft, hard)


@pytest.mark.parametrize("kind", KINDS)
def test_annealing_does_not_recompile(kind):
    params, fast, _ = make(kind, [7, 3], 7)
    traces = []

    @jax.jit
    def gates(tau, hard):
        traces.append(1)
        return fast(params, tau, hard)

    for step in range(4):
        gates(jnp.float32(8.0 / (step + 1)), jnp.float32(step / 3))
    assert len(traces) == 1


def test_rectangle_bounds_are_the_open_frames():
    rng = np.random.default_rng(4)
    lengths = jnp.array([40, 1, 17])
    center = jnp.asarray(rng.uniform(-3, 45, (3, 4, 8)), jnp.float32)
    width = jnp.asarray(rng.uniform(1, 30, (3, 4, 8)), jnp.float32)
    gates = pulse.rectangle_gates(center, width, mask_from_lengths(lengths, 40), 1.0, True)
    start, end = pulse.rectangle_bounds(center, width, lengths)
    i = np.arange(40)
    np.testing.assert_array_equal((i >= start[..., None]) & (i < end[..., None]), gates)


def test_rectangle_at_known_frames():
    mask = jnp.ones((1, 10), bool)
    gates = pulse.rectangle_gates(
        jnp.full((1, 1, 1), 4.0), jnp.full((1, 1, 1), 3.0), mask, 1.0, True
    )
    assert np.flatnonzero(gates).tolist() == [3, 4, 5]


def test_run_gates_ignore_nan_on_padding():
    mask = mask_from_lengths(jnp.array([3]), 5)
    logit = jnp.array([1.0, -2.0, 0.5, jnp.nan, jnp.inf]).reshape(1, 1, 1, 5)
    gates = pulse.run_gates(logit, mask, 0.5, 0.3)
    grad = jax.grad(lambda x: pulse.run_gates(x, mask, 0.5, 0.3).sum())(logit)
    np.testing.assert_array_equal(gates[0, 0, 0, 3:], 0.0)
    np.testing.assert_array_equal(grad[0, 0, 0, 3:], 0.0)
    assert np.isfinite(grad).all()
    assert np.all(np.asarray(grad[0, 0, 0, :3]) > 0)


def test_periodic_gates_stay_exact_at_two_minutes():
    n = 6000
    period = np.array([[2.0, 3.7]], np.float32)
    phase, duty = np.array([[0.2, 0.9]], np.float32), np.array([[0.3, 0.6]], np.float32)
    mask = np.ones((1, n), bool)
    gates = pulse.periodic_gates(period, jnp.array(phase), jnp.array(duty), jnp.array(mask), 0.5)
    want = pulse.periodic_gates_reference(period, phase, duty, mask, 0.5)
    np.testing.assert_allclose(gates, want, atol=3e-6)


def test_periodic_duty_is_the_open_share():
    mask = jnp.ones((1, 3000), bool)
    one = jnp.ones((1, 1))
    gates = pulse.periodic_gates(37.3 * one, 0.11 * one, 0.35 * one, mask, 1.0, True)
    assert abs(float(gates.mean()) - 0.35) < 0.005


def test_periods_are_log_spaced_and_every_head_covers_them():
    periods = pulse.log_spaced_periods(4, 4, 256.0)
    assert periods.dtype == np.float32
    ratio = np.diff(np.log(np.sort(periods.ravel())))
    np.testing.assert_allclose(ratio, math.log(128) / 15, rtol=1e-5)
    assert periods.min() == pytest.approx(2.0)
    assert periods.max() == pytest.approx(256.0)
    np.testing.assert_allclose(periods.min(1), 2 * 128 ** (np.arange(4) / 15), rtol=1e-5)
    np.testing.assert_allclose(periods.max(1), 2 * 128 ** (np.arange(12, 16) / 15), rtol=1e-5)


def test_relative_position():
    u = np.asarray(pulse.relative_position(jnp.array([5, 1, 2, 0]), 5))
    np.testing.assert_allclose(u[0], [0, 0.25, 0.5, 0.75, 1])
    assert u[1, 0] == 0
    np.testing.assert_allclose(u[2, :2], [0, 1])
    assert np.isfinite(u).all()
