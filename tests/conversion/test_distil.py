"""Progressive replacement: the schedule by hand, what learns in each phase, and the loss against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from edgespeech.conversion.ctc_task import CTCDistilConfig, CTCTask
from edgespeech.conversion.distil import (
    DistilConfig,
    Lesson,
    apply_windows,
    distil_objective,
    trainable,
    trained_mask,
    windows,
)
from edgespeech.conversion.mixers import lpa_factory
from edgespeech.conversion.run import Teacher
from edgespeech.conversion.sweep import make_replacements
from edgespeech.conversion.switch import install_switches
from edgespeech.nn.lpa import LPAConfig
from edgespeech.training.ctc import ctc_per_token
from edgespeech.training.state import init_state, make_step
from tests.support.tiny import batch_with_filler, tiny_model, tone_source

SMALL_LPA = LPAConfig(aperiodic=2, periodic=1, positional=1, kernel_size=3, local_kernel_size=3)
ORDER = (2, 0)  # layer 1 keeps its attention
CONFIG = CTCDistilConfig(steps_per_layer=10, learning_rate=1e-2, ctc=0.7, kl=0.4, hidden=0.3)
OFF, ALONE, WITH_FFN, HARD = (0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)

# step: layers 0, 1, 2, each (active, co-adapting, hard)
TABLE = {
    0: (OFF, OFF, ALONE),
    2: (OFF, OFF, ALONE),
    3: (OFF, OFF, WITH_FFN),
    5: (OFF, OFF, WITH_FFN),
    6: (OFF, OFF, HARD),
    9: (OFF, OFF, HARD),
    10: (ALONE, OFF, HARD),
    13: (WITH_FFN, OFF, HARD),
    16: (HARD, OFF, HARD),
    500: (HARD, OFF, HARD),
}


class Setup:
    """A teacher, a student with switches, one lesson, and the jitted loss."""

    def __init__(self):
        self.teacher = Teacher(tiny_model(), CTCTask())
        self.student = nnx.clone(self.teacher.model)
        factory = lpa_factory(SMALL_LPA)
        install_switches(self.student, make_replacements(self.teacher.model, factory, 1))
        self.graphdef, self.params, self.frozen = nnx.split(
            self.student, trainable(self.student), ...
        )
        self.batch = batch_with_filler(tone_source())
        self.lesson = self.teacher.lesson(self.batch, self.frozen)

    def output(self, step, order=ORDER):
        """What the student says at a step, by hand."""
        student = nnx.clone(self.student)
        apply_windows(student, windows(order, 3, jnp.asarray(step), CONFIG))
        return student(self.batch.audio, self.batch.audio_lengths)


@pytest.fixture(scope="module")
def setup():
    return Setup()


def as_table(state):
    return tuple(tuple(int(flag[layer]) for flag in state) for layer in range(3))


@pytest.mark.parametrize("step", TABLE)
def test_windows_by_hand(step):
    assert as_table(windows(ORDER, 3, jnp.asarray(step), CONFIG)) == TABLE[step]


def test_windows_without_co_adaptation():
    config = DistilConfig(steps_per_layer=10, co_adapt=False)
    expected = tuple((a, 0, h) for a, _, h in TABLE[16])
    assert as_table(windows(ORDER, 3, jnp.asarray(16), config)) == expected


@pytest.mark.parametrize("length", [1, 2, 3, 7, 25, 30, 50, 100, 200])
def test_compiled_phases_begin_at_the_exact_step(length):
    config = DistilConfig(steps_per_layer=length)
    steps = np.arange(3 * length)
    found = jax.jit(jax.vmap(lambda step: windows((1, 0), 2, step, config)))(jnp.asarray(steps))
    for layer, rank in ((1, 0), (0, 1)):
        # In whole numbers: 10 elapsed >= 3 length, and >= 6 length.
        elapsed = steps - rank * length
        np.testing.assert_array_equal(found.active[:, layer], elapsed >= 0)
        np.testing.assert_array_equal(
            found.co_adapting[:, layer], (elapsed >= 0) & (10 * elapsed >= 3 * length)
        )
        np.testing.assert_array_equal(
            found.hard[:, layer], (elapsed >= 0) & (10 * elapsed >= 6 * length)
        )


def test_learning_rate_by_hand():
    config = DistilConfig(steps_per_layer=10, learning_rate=2.0)
    found = [float(config.schedule(jnp.asarray(step), 2)) for step in range(20)]
    assert found[0] == pytest.approx(2.0)
    assert found[5] == pytest.approx(1.1)  # half way between the peak and a tenth of it
    cosine = 0.2 + 1.8 * (1 + np.cos(np.pi * np.arange(10) / 10)) / 2
    np.testing.assert_allclose(found, np.tile(cosine, 2), rtol=1e-5)


def test_learning_rate_of_the_joint_steps():
    """Two windows of 10, then 8 joint steps from the peak down to a quarter of it."""
    config = DistilConfig(steps_per_layer=10, learning_rate=2.0, joint_steps=8, final_rate=0.25)
    found = jax.jit(jax.vmap(lambda step: config.schedule(step, 2)))(jnp.arange(32))
    windows_only = DistilConfig(steps_per_layer=10, learning_rate=2.0)
    alone = [float(windows_only.schedule(jnp.asarray(step), 2)) for step in range(20)]
    np.testing.assert_allclose(found[:20], alone, rtol=1e-6)
    cosine = 0.5 + 1.5 * (1 + np.cos(np.pi * np.arange(8) / 8)) / 2
    np.testing.assert_allclose(found[20:28], cosine, rtol=1e-5)
    np.testing.assert_allclose(found[28:], 0.5, rtol=1e-6)
    assert [config.num_steps(count, 2) for count in (0, 1, 2)] == [0, 10, 28]


def test_phases_begin_where_the_numbers_say():
    config = DistilConfig(steps_per_layer=10, co_adapt_from=0.5, hard_from=0.2)
    table = {1: ALONE, 2: (1, 0, 1), 4: (1, 0, 1), 5: HARD, 9: HARD}
    for step, expected in table.items():
        assert as_table(windows(ORDER, 3, jnp.asarray(step), config)) == (OFF, OFF, expected)
    # A whole window: only once the next one has begun, or the joint steps have.
    late = DistilConfig(steps_per_layer=10, co_adapt_from=1.0, hard_from=1.0, joint_steps=5)
    for step, expected in {
        9: (OFF, OFF, ALONE),
        10: (ALONE, OFF, HARD),
        20: (HARD, OFF, HARD),
    }.items():
        assert as_table(windows(ORDER, 3, jnp.asarray(step), late)) == expected


def test_without_the_curriculum_gates_are_hard_from_the_start():
    config = DistilConfig(steps_per_layer=10, curriculum=False)
    assert as_table(windows(ORDER, 3, jnp.asarray(0), config)) == (OFF, OFF, (1, 0, 1))
    assert as_table(windows(ORDER, 3, jnp.asarray(3), config)) == (OFF, OFF, HARD)


def test_settings_are_those_of_older_checkpoints():
    old = {"steps_per_layer", "learning_rate", "kl", "hidden", "co_adapt", "ctc"}
    assert CTCDistilConfig().settings.keys() == old
    changed = CTCDistilConfig(joint_steps=3, init="random", hard_from=0.5)
    assert changed.settings == CTCDistilConfig().settings | {
        "joint_steps": 3,
        "init": "random",
        "hard_from": 0.5,
    }
    assert changed.weights == {"ctc": 1.0, "kl": 1.0, "hidden": 1.0}


def test_trainable_by_name(setup):
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(setup.params)}
    frozen = {
        ".".join(map(str, path))
        for path, value in nnx.to_flat_state(setup.frozen)
        if isinstance(value, nnx.Param)
    }
    assert all(name.startswith("layers.") for name in names)
    assert not any(".mixer.attention." in name for name in names)
    for layer in range(3):
        prefix = f"layers.{layer}"
        assert {
            f"{prefix}.ffn.expand.kernel",
            f"{prefix}.ffn.contract.bias",
            f"{prefix}.mixer_norm.scale",
            f"{prefix}.ffn_norm.bias",
            f"{prefix}.mixer.replacement.alpha",
            f"{prefix}.mixer.replacement.v_proj.kernel",
        } <= names
        assert f"{prefix}.mixer.attention.q_proj.kernel" in frozen
    # The head, the front end and the position embedding are the teacher's.
    assert {"head.kernel", "norm.scale", "projection.kernel", "positions.gain"} <= frozen


def allowed(name, step):
    """Whether a parameter of this name may change at a step, by hand."""
    _, layer, part, *_ = name.split(".")
    active, co_adapting, _ = TABLE[step][int(layer)]
    return bool(active if part == "mixer" else co_adapting)


@pytest.fixture(scope="module")
def step_function(setup):
    _, unravel = ravel_pytree(setup.params)
    optimizer = optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.98), optax.scale_by_learning_rate(1e-2)
    )
    step = make_step(
        distil_objective(setup.graphdef, CTCTask(), ORDER, CONFIG),
        unravel,
        optimizer,
        0.0,
        trained_mask(setup.params, setup.student, ORDER, CONFIG),
    )
    return jax.jit(step), init_state(setup.params, optimizer), unravel


@pytest.mark.parametrize("step", [2, 5, 6, 10, 13, 16])
def test_only_what_the_phase_allows_changes(setup, step_function, step):
    function, state, unravel = step_function
    state = state._replace(step=jnp.asarray(step, jnp.int32))
    after, metrics = function(state, setup.lesson, jax.random.key(0))
    assert float(metrics["skipped"]) == 0
    changed = {}
    pairs = zip(
        nnx.to_flat_state(unravel(state.params)),
        nnx.to_flat_state(unravel(after.params)),
        strict=True,
    )
    for (path, before), (_, now) in pairs:
        name = ".".join(map(str, path))
        changed[name] = np.asarray(before[...]).tobytes() != np.asarray(now[...]).tobytes()
    assert not [name for name, moved in changed.items() if moved and not allowed(name, step)]
    # The norm in front of the first mixers may get no gradient to speak of, but the weights below always do.
    for name, moved in changed.items():
        if allowed(name, step) and name.endswith(("alpha", "v_proj.kernel", "expand.kernel")):
            assert moved, name


@pytest.mark.parametrize("step", [0, 4, 7, 12, 18])
def test_loss_equals_numpy(setup, step):
    loss = _jitted_loss(setup.graphdef, ORDER)
    total, metrics = loss(setup.params, setup.lesson, None, jnp.asarray(step))
    batch, output = setup.batch, setup.output(step)
    teacher = setup.teacher.model(batch.audio, batch.audio_lengths)
    rows = np.flatnonzero(batch.weights)

    def log_probs(logits):
        logits = np.asarray(logits, np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    t, s = log_probs(teacher.logits), log_probs(output.logits)
    kl = [
        np.sum((np.exp(t[r]) * (t[r] - s[r]))[: output.lengths[r]]) / batch.target_lengths[r]
        for r in rows
    ]
    np.testing.assert_allclose(metrics["kl"], np.mean(kl), rtol=1e-4, atol=1e-6)

    relative = []
    for layer in ORDER[: 1 + step // 10]:
        frames = [
            np.concatenate([np.asarray(h[layer][r, : output.lengths[r]]) for r in rows])
            for h in (output.hidden, teacher.hidden)
        ]
        ours, theirs = (f.astype(np.float64) for f in frames)
        relative.append(np.mean((ours - theirs) ** 2) / theirs.var())
    np.testing.assert_allclose(metrics["hidden"], np.mean(relative), rtol=1e-4)

    ctc = np.mean(np.asarray(ctc_per_token(output.logits, output.lengths, batch))[rows])
    np.testing.assert_allclose(metrics["ctc"], ctc, rtol=1e-4)
    weighted = 0.7 * ctc + 0.4 * np.mean(kl) + 0.3 * np.mean(relative)
    np.testing.assert_allclose(total, weighted, rtol=1e-4)


def test_nothing_replaced_costs_nothing_but_ctc(setup):
    total, metrics = _jitted_loss(setup.graphdef, ())(
        setup.params, setup.lesson, None, jnp.asarray(17)
    )
    assert float(metrics["hidden"]) == 0.0
    assert abs(float(metrics["kl"])) < 1e-6
    np.testing.assert_allclose(total, 0.7 * metrics["ctc"], rtol=1e-5)


def test_filler_rows_count_nowhere(setup):
    loss = _jitted_loss(setup.graphdef, ORDER)
    audio = setup.batch.audio.copy()
    audio[setup.batch.weights == 0] = 0.3 * np.random.default_rng(0).normal(size=audio.shape[1])
    other = setup.teacher.lesson(setup.batch._replace(audio=audio), setup.frozen)
    for found, expected in zip(
        jax.tree.leaves(loss(setup.params, other, None, jnp.asarray(12))),
        jax.tree.leaves(loss(setup.params, setup.lesson, None, jnp.asarray(12))),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_lesson_is_the_batch_with_the_teachers_output(setup):
    output = setup.teacher.model(setup.batch.audio, setup.batch.audio_lengths)
    assert isinstance(setup.lesson, Lesson)
    assert setup.lesson.batch is setup.batch
    real = setup.batch.weights > 0
    for found, expected in zip(
        (setup.lesson.teacher.logits, *setup.lesson.teacher.hidden),
        (output.logits, *output.hidden),
        strict=True,
    ):
        np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=1e-5)


@functools.cache
def _jitted_loss(graphdef, order):
    return jax.jit(distil_objective(graphdef, CTCTask(), order, CONFIG))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps_per_layer", 0), ("learning_rate", 0.0), ("ctc", -1.0), ("kl", -0.1)),
        *(("hidden", -2), ("co_adapt_from", -0.1), ("hard_from", 1.1), ("final_rate", 2.0)),
        *(("joint_steps", -1), ("init", "zeros")),
    ],
)
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        CTCDistilConfig(**{name: value})
