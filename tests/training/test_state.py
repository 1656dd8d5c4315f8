"""The update against plain numpy: AdamW, clipping, schedule, moving average, skipped steps, frozen parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from edgespeech.training.checkpoint import StageCheckpoints
from edgespeech.training.state import OptimizerConfig, init_state, make_optimizer, make_step
from tests.support.tiny import assert_same_bits

PARAMS = {
    "bias": jnp.asarray([0.5, -1.5]),
    "kernel": jnp.asarray([[1.0, -2.0], [0.25, 3.0]]),
    "scale": jnp.asarray(2.0),
}
DECAYED = np.asarray([0, 0, 1, 1, 1, 1, 0], np.float64)  # raveled by name: only the matrix
STEPS = 12
KEY = jax.random.key(0)


def learning_rate(config, step, steps=STEPS):
    """Linear from 0 over the warm-up, then half a cosine to `final_rate` times the peak."""
    warmup = min(max(1, int(config.warmup * steps)), steps - 1)
    if step < warmup:
        return config.learning_rate * step / warmup
    phase = min(1.0, (step - warmup) / (steps - warmup))
    cosine = 0.5 * (1 + np.cos(np.pi * phase))
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * cosine)


class PlainAdamW:
    """Clip by the global norm, Adam (0.9, 0.98, 1e-8) with bias correction, decoupled decay; float64."""

    def __init__(self, config, params, steps=STEPS):
        self.config, self.steps = config, steps
        self.params = np.asarray(params, np.float64)
        self.average = self.params.copy()
        self.first, self.second, self.step = np.zeros(7), np.zeros(7), 0

    def update(self, gradient):
        gradient = np.asarray(gradient, np.float64)
        norm = np.sqrt(np.sum(gradient**2))
        if norm > self.config.clip:
            gradient = gradient * self.config.clip / norm
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.98 * self.second + 0.02 * gradient**2
        count = self.step + 1
        direction = (self.first / (1 - 0.9**count)) / (
            np.sqrt(self.second / (1 - 0.98**count)) + 1e-8
        )
        direction = direction + self.config.weight_decay * DECAYED * self.params
        self.params = self.params - learning_rate(self.config, self.step, self.steps) * direction
        decay = min(self.config.average_decay, (1 + self.step) / (10 + self.step))
        self.average = decay * self.average + (1 - decay) * self.params
        self.step += 1


def linear_loss(params, batch, key, step):
    """A loss whose gradient is the batch."""
    del key, step
    vector, _ = ravel_pytree(params)
    value = jnp.vdot(vector, batch)
    return value, {"seen": value}


def build(config, loss=linear_loss, trained=None, steps=STEPS):
    _, unravel = ravel_pytree(PARAMS)
    optimizer = make_optimizer(config, steps, PARAMS)
    step = jax.jit(make_step(loss, unravel, optimizer, config.average_decay, trained))
    return step, init_state(PARAMS, optimizer)


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(learning_rate=0.1, weight_decay=0.3, clip=1.0, warmup=0.25),
        OptimizerConfig(learning_rate=0.02, weight_decay=0.0, clip=1e9, warmup=0.0),
        OptimizerConfig(learning_rate=0.1, average_decay=0.2, warmup=1.0, final_rate=1.0),
    ],
)
def test_updates_equal_plain_adamw(config):
    step, state = build(config)
    plain = PlainAdamW(config, state.params)
    random = np.random.default_rng(0)
    for index in range(STEPS):
        # From far below the clipped norm to far above.
        gradient = (random.normal(size=7) * 10.0 ** (index % 4 - 2)).astype(np.float32)
        before = np.asarray(state.params, np.float64)
        state, metrics = step(state, gradient, KEY)
        plain.update(gradient)
        np.testing.assert_allclose(state.params, plain.params, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(state.average, plain.average, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(gradient), rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], before @ gradient, rtol=1e-4, atol=1e-5)
        assert float(metrics["skipped"]) == 0
        assert int(state.step) == index + 1


def test_clip_bounds_the_gradient_and_not_a_small_one():
    big, small = np.full(7, 100.0, np.float32), np.full(7, 0.01, np.float32)
    config = OptimizerConfig(clip=0.5)
    step, state = build(config)
    clipped, metrics = step(state, big, KEY)
    # Adam's first moment after one step is a tenth of the gradient it was given.
    first = clipped.optimizer[1].mu
    np.testing.assert_allclose(np.linalg.norm(first) * 10, 0.5, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], 100 * np.sqrt(7), rtol=1e-6)
    kept, _ = step(state, small, KEY)
    np.testing.assert_allclose(kept.optimizer[1].mu * 10, small, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_mean_of_several_gradients_makes_one_update(accumulate):
    config = OptimizerConfig(learning_rate=0.1, clip=1.0, warmup=0.25, accumulate=accumulate)
    step, state = build(config, steps=STEPS * accumulate)
    plain = PlainAdamW(config, state.params)
    random = np.random.default_rng(0)
    for index in range(STEPS):
        gradients = random.normal(size=(accumulate, 7)).astype(np.float32)
        before = np.asarray(state.params)
        for part in gradients:
            np.testing.assert_array_equal(state.params, before)
            # A step that is skipped is no part of the mean.
            state, metrics = step(state, np.full(7, np.nan, np.float32), KEY)
            assert float(metrics["skipped"]) == 1
            state, metrics = step(state, part, KEY)
            expected = learning_rate(config, index)
            np.testing.assert_allclose(metrics["learning_rate"], expected, rtol=1e-5)
        plain.update(gradients.mean(0))
        np.testing.assert_allclose(state.params, plain.params, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 40])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_schedule_endpoints(steps, warmup):
    config = OptimizerConfig(
        learning_rate=0.5, warmup=warmup, final_rate=0.1, weight_decay=0.0, clip=1e9
    )
    span = max(2, steps)
    peak = min(max(1, int(warmup * span)), span - 1)
    optimizer = make_optimizer(config, steps, PARAMS)
    vector, _ = ravel_pytree(PARAMS)
    state = optimizer.init(vector)
    update = jax.jit(optimizer.update)
    rates = []
    for _ in range(span + 2):
        # A constant gradient: Adam's direction is 1, so the update is the learning rate.
        updates, state = update(jnp.ones(7), state, vector)
        rates.append(-float(updates[0]))
    assert rates[0] == 0
    assert rates[peak] == pytest.approx(0.5, rel=1e-4)
    assert max(rates) == pytest.approx(0.5, rel=1e-4)
    # At the end and beyond it.
    assert rates[span] == pytest.approx(0.05, rel=1e-3)
    assert rates[span + 1] == pytest.approx(0.05, rel=1e-3)
    expected = [learning_rate(config, i, span) for i in range(span + 2)]
    np.testing.assert_allclose(rates, expected, rtol=1e-3, atol=1e-6)


def test_moving_average():
    config = OptimizerConfig(average_decay=0.5, learning_rate=0.1)
    step, state = build(config)
    decays = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5]
    average = np.asarray(state.params, np.float64)
    for decay in decays:
        state, _ = step(state, np.ones(7, np.float32), KEY)
        average = decay * average + (1 - decay) * np.asarray(state.params, np.float64)
        np.testing.assert_allclose(state.average, average, rtol=1e-5)


def test_no_moving_average_is_the_parameters():
    step, state = build(OptimizerConfig(average_decay=0.0))
    for _ in range(3):
        state, _ = step(state, np.ones(7, np.float32), KEY)
    assert_same_bits(state.average, state.params)


@pytest.mark.parametrize("fault", ["gradient", "loss"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(fault, value):
    def loss(params, batch, key, step):
        plain, _ = linear_loss(params, batch["gradient"], key, step)
        return plain + batch["loss"], {}

    good = {"gradient": np.ones(7, np.float32), "loss": np.float32(0)}
    bad = dict(good)
    bad[fault] = bad[fault] + np.float32(value)
    step, state = build(OptimizerConfig(), loss)
    before, _ = step(state, good, KEY)
    after, metrics = step(before, bad, KEY)
    assert float(metrics["skipped"]) == 1
    assert int(after.step) == int(before.step) + 1
    assert_same_bits(after[1:], before[1:])  # parameters, average, optimiser with its counts
    later, metrics = step(after, good, KEY)
    assert float(metrics["skipped"]) == 0
    assert np.isfinite(later.params).all()
    assert not np.array_equal(later.params, after.params)


def test_frozen_parameters_stay_bit_for_bit():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, clip=1.0)
    mask = np.asarray([1, 0, 1, 0, 0, 1, 0], np.float32)

    # Frozen for three steps, and free after them.
    def trained(step):
        return jnp.where(step < 3, mask, 1.0)

    step, state = build(config, trained=trained)
    start = np.asarray(state.params)
    frozen = mask == 0
    # Huge gradients of frozen parameters: neither the norm nor the moments may see them.
    gradient = np.where(frozen, 1e6, 0.1).astype(np.float32)
    plain = PlainAdamW(config, start)
    for _ in range(3):
        state, metrics = step(state, gradient, KEY)
        plain.update(gradient * mask)
        assert_same_bits(np.asarray(state.params)[frozen], start[frozen])
        np.testing.assert_allclose(
            np.asarray(state.params)[~frozen], plain.params[~frozen], rtol=1e-5
        )
        np.testing.assert_allclose(metrics["gradient_norm"], 0.1 * np.sqrt(3), rtol=1e-5)
    state, _ = step(state, gradient, KEY)
    assert (np.asarray(state.params)[frozen] != start[frozen]).all()


def test_random_key_of_a_step_is_folded_from_its_number():
    def loss(params, batch, key, step):
        del batch
        return linear_loss(params, jnp.ones(7), key, step)[0], {"draw": jax.random.uniform(key)}

    step, state = build(OptimizerConfig(), loss)
    for index in range(3):
        expected = jax.random.uniform(jax.random.fold_in(KEY, index))
        state, metrics = step(state, np.zeros(()), KEY)
        assert float(metrics["draw"]) == float(expected)


EXTRA = {"count": jnp.asarray(3, jnp.int32), "mean": jnp.asarray([1.0, -2.0])}


def build_with_extra(config):
    """The linear loss, with a running mean of the batch beside it that has a part in the value."""

    def loss(params, batch, key, step, extra):
        value, metrics = linear_loss(params, batch, key, step)
        extra = {"count": extra["count"] + 1, "mean": 0.9 * extra["mean"] + 0.1 * batch[:2]}
        return value + jnp.sum(extra["mean"]), metrics, extra

    _, unravel = ravel_pytree(PARAMS)
    optimizer = make_optimizer(config, STEPS, PARAMS)
    step = jax.jit(make_step(loss, unravel, optimizer, config.average_decay))
    return step, init_state(PARAMS, optimizer, EXTRA)


def test_extra_is_carried_and_not_optimised():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.3)
    (step, state), (plain_step, plain_state) = build_with_extra(config), build(config)
    mean = np.asarray(EXTRA["mean"], np.float64)
    random = np.random.default_rng(0)
    for index in range(STEPS):
        gradient = random.normal(size=7).astype(np.float32)
        state, metrics = step(state, gradient, KEY)
        plain_state, plain_metrics = plain_step(plain_state, gradient, KEY)
        mean = 0.9 * mean + 0.1 * gradient[:2]
        np.testing.assert_allclose(state.extra["mean"], mean, rtol=1e-5, atol=1e-6)
        assert int(state.extra["count"]) == 3 + index + 1
        np.testing.assert_allclose(
            metrics["loss"], plain_metrics["loss"] + mean.sum(), rtol=1e-5, atol=1e-5
        )
        assert_same_bits(state[:4], plain_state[:4])
    assert plain_state.extra is None


def test_skipped_step_keeps_the_extra():
    step, state = build_with_extra(OptimizerConfig())
    state, _ = step(state, np.ones(7, np.float32), KEY)
    bad = np.full(7, np.nan, np.float32)
    after, metrics = step(state, bad, KEY)
    assert float(metrics["skipped"]) == 1
    assert_same_bits(after[1:], state[1:])


def test_extra_is_in_the_checkpoint(tmp_path):
    step, state = build_with_extra(OptimizerConfig())
    saved, _ = step(state, np.ones(7, np.float32), KEY)
    with StageCheckpoints(tmp_path, "stage", {}) as checkpoints:
        checkpoints.save(saved)
    with StageCheckpoints(tmp_path, "stage", {}) as checkpoints:
        restored = checkpoints.restore(state)
    assert restored is not None
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert_same_bits(restored, saved)


def test_state_has_arrays_of_its_own():
    _, state = build(OptimizerConfig())
    assert_same_bits(state.params, state.average)
    assert state.params.unsafe_buffer_pointer() != state.average.unsafe_buffer_pointer()
    assert int(state.step) == 0
    _, state = build_with_extra(OptimizerConfig())
    assert state.extra["mean"].unsafe_buffer_pointer() != EXTRA["mean"].unsafe_buffer_pointer()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warmup", 1.5),
        ("warmup", float("nan")),
        ("final_rate", -0.1),
        ("average_decay", 1.0),
        ("learning_rate", 0.0),
        ("clip", -1.0),
        ("accumulate", 0),
    ],
)
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        OptimizerConfig(**{name: value})
