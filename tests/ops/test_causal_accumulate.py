"""Causal accumulation: every form against the float64 loop, against closed forms and against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.ops.accumulate import (
    RunState,
    run_average_init,
    run_average_reference,
    run_broadcast,
)
from edgespeech.ops.causal_accumulate import (
    CausalMethod,
    causal_accumulate,
    causal_accumulate_reference,
    window_decay,
)
from tests.support.gradients import assert_gradient

METHODS = list(CausalMethod)
FORMS = METHODS[1:]  # AUTO is one of the others


@jax.jit
def every_form(*arrays):
    """One compilation for all of them."""
    return [causal_accumulate(*arrays, method) for method in METHODS]


def inputs(n, b=2, h=2, p=3, c=4, seed=0, per_frame=True):
    """Decays and gates with exact zeros and ones among them, and a state that is not empty."""
    rng = np.random.default_rng(seed)
    decay, gates = np.clip(rng.uniform(-0.2, 1.2, (2, b, h, p, n)), 0, 1)
    values = rng.normal(size=(b, h, n, c)) + 1.0
    alpha = rng.normal(size=(b, h, p, n) if per_frame else (h, p))
    state = RunState(rng.normal(size=(b, h, p, c)), rng.uniform(0.5, 2.0, (b, h, p)))
    return jax.tree.map(np.float32, (decay, gates, values, alpha, state))


def new_stream(b=1, h=1, p=1, c=1):
    return run_average_init(b, h, p, c)


def assert_close(got, want, atol=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol, rtol=5e-6), got, want)


# A block has 16 frames.
@pytest.mark.parametrize(
    ("n", "per_frame", "dtype"),
    [
        (1, True, np.float32),
        (16, False, np.float32),
        (37, True, np.float32),
        (37, False, jnp.bfloat16),
    ],
)
def test_frames_and_state(n, per_frame, dtype):
    decay, gates, values, alpha, state = inputs(n, per_frame=per_frame)
    values = jnp.asarray(values, dtype)
    want = causal_accumulate_reference(decay, gates, np.float64(values), alpha, state)
    for y, last in every_form(decay, gates, values, alpha, state):
        assert {x.dtype for x in (y, *last)} == {jnp.dtype("float32")}
        assert_close((y, *last), want)


@pytest.mark.parametrize("method", FORMS)
def test_gradient(method):
    decay, gates, values, alpha, state = inputs(18, b=1, p=2, c=2)
    # Away from the corners, where the difference quotient would leave [0, 1] and meet c = 0.
    decay, gates = 0.1 + 0.8 * decay, 0.1 + 0.8 * gates

    def fast(*arrays):
        y, last = causal_accumulate(*arrays[:4], RunState(*arrays[4:]), method)
        return jnp.concatenate([x.ravel() for x in (y, *last)])

    def slow(*arrays):
        outputs = causal_accumulate_reference(*arrays[:4], RunState(*arrays[4:]))
        return np.concatenate([x.ravel() for x in outputs])

    arrays = [np.float64(x) for x in (decay, gates, values, alpha, *state)]
    assert_gradient(fast, slow, arrays)


def test_gradients_agree_pairwise():
    """Where gates and decays are exactly 0 or 1, too: by the values and the state."""
    decay, gates, values, alpha, state = inputs(37)
    weight = np.random.default_rng(1).normal(size=values.shape).astype(np.float32)

    @jax.jit
    def gradients(values, state):
        def loss(values, state, method):
            return jnp.sum(
                weight * causal_accumulate(decay, gates, values, alpha, state, method)[0]
            )

        return [jax.grad(loss, argnums=(0, 1))(values, state, method) for method in FORMS]

    first, *others = gradients(values, state)
    for other in others:
        assert_close(other, first, atol=2e-5)


def test_gate_as_decay_is_the_run_so_far():
    _, gates, values, alpha, _ = inputs(20)
    for g in (gates, gates > 0.4):
        means = run_average_reference(g, values, causal=True)
        want = run_broadcast(g, jnp.float32(means), alpha)
        for y, _ in every_form(np.float32(g), g, values, alpha, new_stream(2, 2, 3, 4)):
            assert_close(y, want)


def test_known_window():
    """One frame, then a closed gate, then another: at half-life 2 the first weighs 1/4 after 4 frames."""
    decay = np.full((1, 1, 1, 5), window_decay(jnp.float32(1.0)))
    gates = np.array([1, 0, 0, 0, 1], bool).reshape(1, 1, 1, 5)
    values = np.float32([8, 100, 100, 100, 3]).reshape(1, 1, 5, 1)
    alpha = np.full((1, 1), 10.0, np.float32)
    for y, state in every_form(decay, gates, values, alpha, new_stream()):
        last = 10 * (8 / 4 + 3) / (1 / 4 + 1)
        np.testing.assert_allclose(y.ravel(), [80, 0, 0, 0, last], rtol=2e-6)
        np.testing.assert_allclose([state.total.item(), state.count.item()], [5, 1.25], rtol=1e-6)


def test_window_decay_is_half_after_a_half_life():
    for half_life in (1.0, 2.0, 30.0, 256.0):
        decay = np.float64(window_decay(jnp.log2(jnp.float32(half_life))))
        assert decay**half_life == pytest.approx(0.5, rel=2e-5)
    assert float(window_decay(jnp.float32(22.0))) < 1.0


def test_chunks_equal_the_whole():
    decay, gates, values, alpha, state = inputs(40)
    want, want_last = every_form(decay, gates, values, alpha, state)[0]
    for method in range(len(METHODS)):
        parts, now = [], state
        for span in (slice(0, 20), slice(20, 40)):
            arrays = decay[..., span], gates[..., span], values[:, :, span], alpha[..., span]
            y, now = every_form(*arrays, now)[method]
            parts.append(y)
        assert_close((np.concatenate(parts, axis=2), now), (want, want_last))


def test_padding_leaves_the_state():
    *_, values, alpha, state = inputs(5)
    ones = np.ones((2, 2, 3, 5), np.float32)
    for y, last in every_form(ones, 0 * ones, values, alpha, state):
        jax.tree.map(np.testing.assert_array_equal, last, state)
        np.testing.assert_array_equal(y, 0.0)


def test_pulse_that_never_opened_is_zero_with_finite_gradient():
    closed, values = np.zeros((1, 1, 1, 5), np.float32), np.ones((1, 1, 5, 2), np.float32)

    @jax.jit
    @jax.grad
    def gradient(gates):
        outputs = every_form(gates, gates, values, np.ones((1, 1)), new_stream(c=2))
        return sum(y.sum() for y, _ in outputs)

    assert np.isfinite(gradient(closed)).all()
    for y, _ in every_form(closed, closed, values, np.ones((1, 1)), new_stream(c=2)):
        np.testing.assert_array_equal(y, 0.0)


def test_auto_loops_over_short_chunks():
    for n, num_loops in ((16, 1), (17, 2)):  # BLOCK has a loop over frames and one over blocks
        program = str(jax.make_jaxpr(causal_accumulate)(*inputs(n)))
        assert program.count("scan[") == num_loops


def test_thirteen_minutes_stay_accurate():
    """20,000 frames of 40 ms around a mean of 30: a window of 256 frames, and a run that never closes."""
    values = np.float32(np.random.default_rng(0).normal(size=(1, 1, 20_000, 1)) + 30.0)
    values = np.repeat(values, 2, axis=1)
    gates = np.ones((1, 2, 1, 20_000), np.float32)
    decay = gates.copy()
    decay[:, 0] = window_decay(jnp.float32(8.0))
    arrays = decay, gates, values, np.ones((2, 1), np.float32), new_stream(h=2)
    want, _, _ = causal_accumulate_reference(*arrays)
    for method in (CausalMethod.LOOP, CausalMethod.BLOCK):
        y, _ = jax.jit(functools.partial(causal_accumulate, method=method))(*arrays)
        np.testing.assert_allclose(y, want, rtol=2e-5)
