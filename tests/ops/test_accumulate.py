"""Pulse and run averages: every form against float64 loops and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.errors import InputError
from edgespeech.ops import pulse
from edgespeech.ops.accumulate import (
    AccumulateMethod,
    broadcast,
    broadcast_reference,
    pulse_average,
    pulse_average_reference,
    run_average,
    run_average_init,
    run_average_reference,
    run_average_step,
    run_broadcast,
)
from tests.support.gradients import assert_gradient

METHODS = list(AccumulateMethod)
FORMS = METHODS[1:]  # AUTO is one of the others
# One compilation instead of one an operation.
run_average_jit = jax.jit(run_average, static_argnums=(2, 3))
pulse_average_jit = jax.jit(pulse_average, static_argnums=2)
rectangle_gates = jax.jit(pulse.rectangle_gates, static_argnums=4)
rectangle_bounds = jax.jit(pulse.rectangle_bounds)
run_gates = jax.jit(pulse.run_gates, static_argnums=3)


def mask_of(lengths, n):
    return np.arange(n) < np.array(lengths)[:, None]


# The scan of pulses works in blocks of 256 frames.
ONE, TWO, SEVEN, LONG, BLOCKS = (1, [1]), (2, [2, 1]), (7, [7, 3]), (75, [75, 40]), (400, [390])


@jax.jit
def every_average(gates, values, bounds):
    """`pulse_average` of rectangles in every form."""
    return [pulse_average(gates, values, method, bounds) for method in METHODS]


def rectangles(n, lengths, h=2, p=3, c=4, seed=0):
    rng = np.random.default_rng(seed)
    b, lengths = len(lengths), np.array(lengths)
    center = np.float32(rng.uniform(0, n - 1, (b, h, p)))
    width = np.float32(rng.uniform(1, 1 + n / 2, (b, h, p)))
    values = np.float32(rng.normal(size=(b, h, n, c)) + 1.0)
    gates = rectangle_gates(center, width, mask_of(lengths, n), 1.0, True)
    return gates, values, rectangle_bounds(center, width, lengths)


def runs(n, lengths, h=2, p=3, c=4, seed=0):
    rng = np.random.default_rng(seed)
    logit = np.float32(rng.normal(size=(len(lengths), h, p, n)) + 1.0)
    values = np.float32(rng.normal(size=(len(lengths), h, n, c)) + 1.0)
    return logit, mask_of(lengths, n), values


@pytest.mark.parametrize(
    ("n", "lengths", "dtype"),
    [(*shape, jnp.float32) for shape in (ONE, SEVEN, LONG, BLOCKS)] + [(*LONG, jnp.bfloat16)],
)
def test_pulse_average_of_rectangles(n, lengths, dtype):
    gates, values, bounds = rectangles(n, lengths)
    values = values.astype(dtype)
    want = pulse_average_reference(gates, np.float64(values))
    for method, got in zip(METHODS, every_average(gates, values, bounds), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=2e-6, rtol=2e-6, err_msg=method.name)


@pytest.mark.parametrize(("n", "lengths"), [TWO, BLOCKS])
def test_pulse_average_of_soft_gates(n, lengths):
    logit, mask, values = runs(n, lengths)
    gates = run_gates(logit, mask, 0.5)
    want = pulse_average_reference(gates, values)
    for method in (AccumulateMethod.MATMUL, AccumulateMethod.SCAN):
        got = pulse_average_jit(gates, values, method)
        np.testing.assert_allclose(got, want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("method", FORMS)
def test_pulse_average_gradient(method):
    gates, values, bounds = rectangles(7, [7, 3])
    values = np.float64(values)
    assert_gradient(
        lambda v: pulse_average(gates, v, method, bounds),
        lambda v: pulse_average_reference(gates, v),
        [values],
    )
    if method is not AccumulateMethod.PREFIX:
        logit, mask, _ = runs(7, [7, 3])
        soft = np.float64(run_gates(logit, mask, 0.5))
        assert_gradient(
            lambda g, v: pulse_average(g, v, method), pulse_average_reference, [soft, values]
        )


@pytest.mark.parametrize("n", [1, 400])
def test_pulse_average_gradients_agree_pairwise(n):
    gates, values, bounds = rectangles(n, [n, max(1, n // 3)])
    weight = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)

    @jax.jit
    def gradients(values):
        def loss(values, method):
            return jnp.sum(weight * pulse_average(gates, values, method, bounds))

        return [jax.grad(loss)(values, method) for method in FORMS]

    first, *others = gradients(values)
    for grad in others:
        np.testing.assert_allclose(grad, first, atol=1e-6)


def test_empty_pulse_averages_to_zero_with_finite_gradient():
    gates, values = np.zeros((1, 1, 2, 5), np.float32), np.ones((1, 1, 5, 3), np.float32)
    for method in (AccumulateMethod.MATMUL, AccumulateMethod.SCAN):
        np.testing.assert_array_equal(pulse_average_jit(gates, values, method), 0.0)
        grad = jax.grad(lambda g, m=method: pulse_average_jit(g, values, m).sum())(gates)
        assert np.isfinite(grad).all()
    empty = (np.full((1, 1, 2), 3),) * 2
    np.testing.assert_array_equal(
        pulse_average_jit(gates, values, AccumulateMethod.PREFIX, empty), np.zeros((1, 1, 2, 3))
    )


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_two_minutes_stay_accurate(offset):
    values = np.float32(np.random.default_rng(0).normal(size=(1, 1, 6000, 4)) + offset)
    # Narrow pulses at the far end are where a plain prefix sum loses its digits.
    start = np.array([[[5990, 5000, 3, 0]]], np.int32)
    bounds = (start, start + np.array([1, 7, 40, 6000], np.int32))
    i = np.arange(6000)
    gates = (i >= bounds[0][..., None]) & (i < bounds[1][..., None])
    want = pulse_average_reference(gates, values)
    for method, got in zip(METHODS, every_average(gates, values, bounds), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-5, rtol=2e-6, err_msg=method.name)


def test_prefix_needs_bounds():
    gates, values, _ = rectangles(7, [7])
    with pytest.raises(InputError, match="bounds"):
        pulse_average(gates, values, AccumulateMethod.PREFIX)


@pytest.mark.parametrize("per_frame", [False, True])
def test_broadcast(per_frame):
    logit, mask, values = runs(20, [20, 9])
    gates = run_gates(logit, mask, 0.7)
    averages = pulse_average(gates, values)
    rng = np.random.default_rng(6)
    alpha = rng.normal(size=(2, 2, 3, 20) if per_frame else (2, 3))
    got = broadcast(gates, averages, jnp.float32(alpha))
    np.testing.assert_allclose(got, broadcast_reference(gates, averages, alpha), atol=2e-6)
    spread = jnp.broadcast_to(averages[:, :, :, None], (2, 2, 3, 20, 4))
    np.testing.assert_allclose(run_broadcast(gates, spread, jnp.float32(alpha)), got, atol=2e-6)
    assert_gradient(
        broadcast, broadcast_reference, [np.float64(gates), np.float64(averages), alpha]
    )


# ----------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("n", "lengths", "causal", "forms"),
    [
        (*ONE, False, FORMS),
        (*SEVEN, False, FORMS),
        (20, [20, 13], False, FORMS),
        (*SEVEN, True, FORMS),
        (*BLOCKS, False, (AccumulateMethod.PREFIX, AccumulateMethod.MATMUL)),
    ],
)
def test_run_average_of_binary_gates(n, lengths, causal, forms):
    logit, mask, values = runs(n, lengths)
    gates = run_gates(logit, mask, 1.0, True)
    want = run_average_reference(gates, values, causal)
    weight = np.random.default_rng(1).normal(size=want.shape).astype(np.float32)
    grads = []
    for method in forms:

        @jax.jit
        def value_and_vjp(values, method=method):
            mean, vjp = jax.vjp(lambda v: run_average(gates, v, method, causal), values)
            return mean, vjp(weight)[0]

        got, grad = value_and_vjp(values)
        np.testing.assert_allclose(got, want, atol=5e-6, rtol=2e-6, err_msg=method.name)
        grads.append(grad)
    for grad in grads[1:]:
        np.testing.assert_allclose(grad, grads[0], atol=2e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "lengths"), [TWO, (20, [20, 13])])
def test_run_average_of_soft_gates(n, lengths, causal):
    logit, mask, values = runs(n, lengths)
    gates = run_gates(logit, mask, 0.3)
    want = run_average_reference(gates, values, causal)
    np.testing.assert_allclose(
        run_average_jit(gates, values, AccumulateMethod.AUTO, causal), want, atol=5e-6
    )


@pytest.mark.parametrize("causal", [False, True])
def test_run_average_gradient(causal):
    # No padding: at a gate of exactly 0 the derivative is of size 1 / eps.
    logit, mask, values = runs(7, [7, 7])
    soft = np.float64(run_gates(logit, mask, 0.5))
    assert_gradient(
        lambda g, v: run_average_jit(g, v, AccumulateMethod.AUTO, causal),
        lambda g, v: run_average_reference(g, v, causal),
        [soft, np.float64(values)],
    )


def test_run_average_of_known_runs():
    gates = jnp.array([1, 1, 0, 1, 1, 1, 0], bool).reshape(1, 1, 1, 7)
    values = jnp.array([1.0, 3, 100, 2, 4, 9, 100]).reshape(1, 1, 7, 1)
    for method in FORMS:
        whole = run_average_jit(gates, values, method, False)
        np.testing.assert_allclose(whole.ravel(), [2, 2, 0, 5, 5, 5, 0], rtol=1e-5)
        so_far = run_average_jit(gates, values, method, True)
        np.testing.assert_allclose(so_far.ravel(), [1, 2, 0, 2, 3, 5, 0], rtol=1e-5)


@pytest.mark.parametrize("tau", [None, 0.4])
def test_streaming_equals_the_causal_scan(tau):
    logit, mask, values = runs(12, [12, 7])
    gates = run_gates(logit, mask, tau or 1.0, True if tau is None else 0.0)

    def stream(values):
        def step(state, frame):
            return run_average_step(state, *frame)

        frames = jnp.moveaxis(gates, 3, 0), jnp.moveaxis(values, 2, 0)
        return jnp.moveaxis(jax.lax.scan(step, run_average_init(2, 2, 3, 4), frames)[1], 0, 3)

    weight = np.random.default_rng(2).normal(size=(2, 2, 3, 12, 4)).astype(np.float32)

    @jax.jit
    def both(values):
        def with_gradient(function):
            out, vjp = jax.vjp(function, values)
            return out, vjp(weight)[0]

        scan = with_gradient(lambda v: run_average(gates, v, AccumulateMethod.SCAN, causal=True))
        return with_gradient(stream), scan

    (got, got_grad), (want, want_grad) = both(values)
    np.testing.assert_allclose(got, want, atol=5e-6)
    np.testing.assert_allclose(got_grad, want_grad, atol=2e-5)


def test_run_forms_for_binary_gates_refuse_others():
    logit, mask, values = runs(7, [7])
    gates = run_gates(logit, mask, 1.0)
    for method in (AccumulateMethod.PREFIX, AccumulateMethod.MATMUL):
        with pytest.raises(InputError, match="boolean"):
            run_average(gates, values, method)


def test_run_prefix_stays_accurate_at_two_minutes():
    logit, mask, values = runs(6000, [6000], h=1, p=2, c=2)
    gates = run_gates(logit, mask, 1.0, True)
    values = values + 30.0
    want = run_average_reference(gates, values)
    got = run_average_jit(gates, values, AccumulateMethod.PREFIX, False)
    np.testing.assert_allclose(got, want, atol=2e-4)
