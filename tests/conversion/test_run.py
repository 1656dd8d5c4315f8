"""The stages of a conversion: what is evaluated is what is saved, and an interrupted one goes on bit for bit."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from edgespeech.conversion.ctc_task import CTCDistilConfig, CTCTask
from edgespeech.conversion.mixers import lpa_factory
from edgespeech.conversion.run import Job, Progressive, Teacher
from edgespeech.conversion.sweep import make_replacements
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA, LPAConfig
from edgespeech.training.metrics import read_metrics
from tests.support.tiny import QUIET, assert_same_bits, tiny_model, tone_source

SMALL_LPA = LPAConfig(aperiodic=2, periodic=1, positional=1, kernel_size=3, local_kernel_size=3)
ORDER = (2, 0)
CONFIG = CTCDistilConfig(steps_per_layer=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def teacher():
    return Teacher(tiny_model(), CTCTask())


def progressive(teacher, workdir, config=CONFIG):
    replacements = make_replacements(teacher.model, lpa_factory(SMALL_LPA), seed=1)
    job = Job(workdir, tone_source(), seed=2, loop=QUIET)
    return Progressive("lpa", teacher, replacements, ORDER, config, job)


def logits(graphdef, state, batch):
    run = jax.jit(lambda state: nnx.merge(graphdef, state)(batch.audio, batch.audio_lengths).logits)
    return np.asarray(run(state))


def advance(path):
    for count in (1, 2):
        path.advance(count)


def rows(workdir):
    return read_metrics(workdir / "metrics" / "convert_lpa.jsonl")


@pytest.fixture(scope="module")
def unbroken(teacher, tmp_path_factory):
    """The path after both layers, with the states of its program at 0, 1 and 2 and the hybrids."""
    workdir = tmp_path_factory.mktemp("unbroken")
    path = progressive(teacher, workdir)
    states, hybrids = [path.state()], [path.hybrid()]
    for count in (1, 2):
        path.advance(count)
        states.append(path.state())
        hybrids.append(path.hybrid())
    return path, states, hybrids, rows(workdir)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_hybrid_equals_the_program_with_switches(teacher, unbroken, count):
    path, states, hybrids, _ = unbroken
    batch = tone_source().batch(0)
    through_program = logits(path.graphdef, states[count], batch)
    alone = logits(*nnx.split(hybrids[count]), batch)
    np.testing.assert_allclose(alone, through_program, rtol=0, atol=1e-5)
    plain = logits(*nnx.split(teacher.model), batch)
    if count == 0:
        np.testing.assert_allclose(alone, plain, rtol=0, atol=1e-5)
    else:
        assert np.abs(alone - plain).max() > 1e-2


@pytest.mark.parametrize("count", [0, 1, 2])
def test_slots_hold_what_the_order_says(teacher, unbroken, count):
    hybrid = unbroken[2][count]
    for index, (layer, old) in enumerate(zip(hybrid.layers, teacher.model.layers, strict=True)):
        if index in ORDER[:count]:
            assert isinstance(layer.mixer, LPA)
        else:
            assert isinstance(layer.mixer, SelfAttention)
            assert_same_bits(nnx.state(layer), nnx.state(old))
    assert_same_bits(nnx.state(hybrid.head), nnx.state(teacher.model.head))


def test_one_program_for_every_number_of_layers(unbroken):
    _, states, _, _ = unbroken
    structures = {str(jax.tree.structure(state)) for state in states}
    shapes = {str([leaf.shape for leaf in jax.tree.leaves(state)]) for state in states}
    assert len(structures) == len(shapes) == 1


def test_every_step_is_logged(unbroken):
    metrics = unbroken[3]
    assert [row["step"] for row in metrics] == list(range(8))
    assert all(row["skipped"] == 0 for row in metrics)


# A window of one or two steps is over before its hard phase begins.
@pytest.mark.parametrize("steps", [2, 4])
def test_gates_are_zero_or_one(teacher, unbroken, tmp_path, steps):
    if steps == CONFIG.steps_per_layer:
        hybrid, count = unbroken[2][2], 2
    else:
        path = progressive(teacher, tmp_path, CTCDistilConfig(steps_per_layer=steps))
        path.advance(1)
        hybrid, count = path.hybrid(), 1
    random = np.random.default_rng(0)
    x, lengths = random.normal(size=(2, 20, 16)).astype(np.float32), np.asarray([20, 13])
    for index in ORDER[:count]:
        gates = hybrid.layers[index].mixer.gates(x, lengths)
        assert gates.keys() == {"aperiodic", "periodic", "positional"}
        for gate in gates.values():
            assert set(np.unique(gate)) <= {0.0, 1.0}
            assert not np.asarray(gate)[1, :, :, 13:].any()


@pytest.mark.parametrize("stop", [2, 6])
def test_interrupted_in_the_middle_then_resumed(teacher, unbroken, tmp_path, monkeypatch, stop):
    """Killed in the first window or in the second: two new programs later all is as if nothing had been."""
    _, states, hybrids, metrics = unbroken
    path, calls = progressive(teacher, tmp_path), []

    def failing(self, batch, frozen, lesson=Teacher.lesson):
        calls.append(1)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return lesson(self, batch, frozen)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "lesson", failing)
        with pytest.raises(KeyboardInterrupt):
            advance(path)
    assert len(rows(tmp_path)) == stop

    resumed = progressive(teacher, tmp_path)
    for count in (1, 2):
        resumed.advance(count)
        if count * CONFIG.steps_per_layer >= stop:
            assert_same_bits(resumed.state(), states[count])
            assert_same_bits(nnx.state(resumed.hybrid()), nnx.state(hybrids[count]))
    assert rows(tmp_path) == metrics


JOINT = dataclasses.replace(CONFIG, joint_steps=3, final_rate=0.5)


@pytest.fixture(scope="module")
def joint(teacher, tmp_path_factory):
    """The path with three joint steps after both layers: workdir, state and hybrid after it, trained parameters."""
    workdir = tmp_path_factory.mktemp("joint")
    path = progressive(teacher, workdir, JOINT)
    trained = []
    for count in (1, 2):
        path.advance(count)
        trained.append(path.trained_parameters())
    return workdir, path, trained


def test_joint_steps_come_after_the_windows(unbroken, joint):
    """Bit for bit the same up to there; then all that is replaced moves, and nothing else."""
    workdir, path, _ = joint
    before, after = unbroken[3], rows(workdir)
    assert [row["step"] for row in after] == list(range(11))
    assert after[:8] == before
    changed = {}
    for (name, new), (_, old) in zip(
        nnx.to_flat_state(nnx.state(path.hybrid(), nnx.Param)),
        nnx.to_flat_state(nnx.state(unbroken[2][2], nnx.Param)),
        strict=True,
    ):
        changed[".".join(map(str, name))] = not np.array_equal(new[...], old[...])
    replaced = tuple(f"layers.{layer}." for layer in ORDER)
    assert all(name.startswith(replaced) for name, moved in changed.items() if moved)
    for name, moved in changed.items():
        if name.startswith(replaced) and name.endswith(("alpha", "v_proj.kernel", "expand.kernel")):
            assert moved, name


def test_joint_steps_interrupted_then_resumed(teacher, joint, tmp_path, monkeypatch):
    workdir, unbroken_path, _ = joint
    path, calls = progressive(teacher, tmp_path, JOINT), []

    def failing(self, batch, frozen, lesson=Teacher.lesson):
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return lesson(self, batch, frozen)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "lesson", failing)
        with pytest.raises(KeyboardInterrupt):
            advance(path)
    assert len(rows(tmp_path)) == 9
    resumed = progressive(teacher, tmp_path, JOINT)
    advance(resumed)
    assert_same_bits(resumed.state(), unbroken_path.state())
    assert rows(tmp_path) == rows(workdir)


def test_trained_parameters(teacher, joint):
    """Those of the replacements, feed-forward networks and norms of the replaced layers."""
    workdir, path, trained = joint
    layers = path.hybrid().layers

    def size(module):
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))

    assert trained == [size(layers[2]), size(layers[2]) + size(layers[0])]
    alone = progressive(teacher, workdir / "alone", dataclasses.replace(CONFIG, co_adapt=False))
    alone._count = 1  # as after advance(1), without the training
    assert alone.trained_parameters() == size(layers[2].mixer)


def test_another_order_is_refused(teacher, unbroken):
    path = unbroken[0]
    job = path._job
    other = Progressive(
        "lpa",
        teacher,
        make_replacements(teacher.model, lpa_factory(SMALL_LPA), seed=1),
        ORDER[::-1],
        CONFIG,
        job,
    )
    with pytest.raises(ValueError, match=r"order was \[3, 1\] and is \[1, 3\]"):
        other.advance(1)


def test_the_teacher_is_left_alone(teacher, unbroken):
    assert_same_bits(nnx.state(teacher.model), nnx.state(tiny_model()))
