"""Checkpoints: what is saved comes back, and what does not fit is refused by name."""

import errno
import gc
import json
import resource
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.errors import InputError
from edgespeech.training.checkpoint import StageCheckpoints
from edgespeech.training.state import TrainState
from tests.support.tiny import assert_same_bits

SETTINGS = {"steps": 100, "model": {"width": 16, "rate": 0.1}, "order": [3, 1]}


def make_state(step: int, width: int = 5) -> TrainState:
    params = jnp.linspace(-1.0, 1.0, width) * (step + 1)
    moments = {"mu": params**2, "count": jnp.asarray(step, jnp.int32), "odd": jnp.asarray([True])}
    return TrainState(jnp.asarray(step, jnp.int32), params, -params, (moments, ()))


def save(workdir, *steps, settings=SETTINGS, keep=2):
    with StageCheckpoints(workdir, "stage", settings, keep) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step))


def restore(workdir, like, settings=SETTINGS, stage="stage"):
    with StageCheckpoints(workdir, stage, settings) as checkpoints:
        return checkpoints.restore(like)


def test_nothing_there(tmp_path):
    assert restore(tmp_path, make_state(0)) is None


def test_round_trip_of_the_latest(tmp_path):
    save(tmp_path, 3, 10, 200)
    restored = restore(tmp_path, make_state(0))
    assert isinstance(restored, TrainState)
    assert_same_bits(restored, make_state(200))
    names = {path.name for path in (tmp_path / "checkpoints" / "stage").iterdir()}
    assert names == {"10", "200"}  # keep=2: the oldest is gone
    # 200 is the latest by number, though "3" and "10" do not sort so as text.
    assert int(restored.step) == 200


def test_not_finite_values_come_back(tmp_path):
    state = make_state(7)._replace(params=jnp.asarray([np.nan, np.inf, -0.0, 1e-45, 3.0]))
    with StageCheckpoints(tmp_path, "stage", SETTINGS) as checkpoints:
        checkpoints.save(state)
    assert_same_bits(restore(tmp_path, make_state(0)), state)


def test_saving_the_same_step_twice_is_one_save(tmp_path):
    save(tmp_path, 4)
    save(tmp_path, 4)
    assert_same_bits(restore(tmp_path, make_state(0)), make_state(4))


def test_stages_do_not_mix(tmp_path):
    save(tmp_path, 4)
    assert restore(tmp_path, make_state(0), stage="other") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 90}, "steps was 100 and is 90"),
        ({"model": {"width": 32, "rate": 0.1}}, "'width': 16, .* and is .*'width': 32"),
        ({"order": [1, 3]}, r"order was \[3, 1\] and is \[1, 3\]"),
        ({"kl": 1.0}, "kl was None and is 1.0"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, change, message):
    save(tmp_path, 4)
    with pytest.raises(InputError, match=message) as error:
        restore(tmp_path, make_state(0), SETTINGS | change)
    assert "another --workdir" in str(error.value)
    # The refusal costs nothing: the checkpoint is still there.
    assert_same_bits(restore(tmp_path, make_state(0)), make_state(4))


def test_a_setting_that_is_gone_is_named(tmp_path):
    save(tmp_path, 4)
    fewer = {name: value for name, value in SETTINGS.items() if name != "steps"}
    with pytest.raises(InputError, match="steps was 100 and is None"):
        restore(tmp_path, make_state(0), fewer)


@pytest.mark.parametrize("width", [4, 6])
def test_another_model_is_refused(tmp_path, capfd, width):
    save(tmp_path, 4)
    message = rf"does not fit this model: .*\(5,\).* has .*\({width},\)"
    with pytest.raises(InputError, match=message) as error:
        restore(tmp_path, make_state(0, width))
    assert str(tmp_path) in str(error.value)
    assert capfd.readouterr().err == ""  # the message alone


def test_another_number_of_arrays_is_refused(tmp_path):
    save(tmp_path, 4)
    like = make_state(0)._replace(optimizer=())
    with pytest.raises(InputError, match="does not fit this model"):
        restore(tmp_path, like)


def test_a_half_written_checkpoint_is_not_the_latest(tmp_path):
    save(tmp_path, 4)
    # What a kill in the middle of a save leaves: a folder under a temporary name.
    folder = tmp_path / "checkpoints" / "stage"
    (folder / "9.orbax-checkpoint-tmp").mkdir()
    (folder / "9.orbax-checkpoint-tmp" / "state").mkdir()
    assert_same_bits(restore(tmp_path, make_state(0)), make_state(4))


def files(folder):
    """The files of a checkpoint that hold something, largest first."""
    return sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: -f.stat().st_size)


def noise_state(step: int) -> TrainState:
    """Arrays that do not compress."""
    random = np.random.default_rng(step).normal(size=50_000)
    return make_state(step)._replace(params=jnp.asarray(random, jnp.float32))


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, halve])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, capfd, damage):
    with StageCheckpoints(tmp_path, "stage", SETTINGS) as checkpoints:
        checkpoints.save(noise_state(4))
        checkpoints.save(noise_state(9))
    folder = tmp_path / "checkpoints" / "stage"
    [largest, *_] = files(folder / "9" / "state")
    assert largest.stat().st_size > 100_000  # the params
    damage(largest)
    assert_same_bits(restore(tmp_path, noise_state(0)), noise_state(4))
    printed = capfd.readouterr().err
    assert f"{folder / '9'} is damaged" in printed
    assert "going on from the one before it, of step 4" in printed
    assert not (folder / "9").exists()
    assert (tmp_path / "checkpoints" / "stage.damaged" / "9").is_dir()
    # It is made anew, and then it is the newest again.
    with StageCheckpoints(tmp_path, "stage", SETTINGS) as checkpoints:
        checkpoints.save(noise_state(9))
    assert_same_bits(restore(tmp_path, noise_state(0)), noise_state(9))


@pytest.mark.parametrize("part", ["position", "state"])
def test_a_checkpoint_without_a_part_is_damaged(tmp_path, capfd, part):
    save(tmp_path, 4, 9)
    shutil.rmtree(tmp_path / "checkpoints" / "stage" / "9" / part)
    assert_same_bits(restore(tmp_path, make_state(0)), make_state(4))
    assert "is damaged" in capfd.readouterr().err


def test_no_checkpoint_is_left_intact(tmp_path, capfd):
    save(tmp_path, 4)
    shutil.rmtree(tmp_path / "checkpoints" / "stage" / "4" / "state")
    assert restore(tmp_path, make_state(0)) is None
    assert "going on without any checkpoint of this stage" in capfd.readouterr().err


def test_checkpoints_older_than_fingerprints(tmp_path):
    save(tmp_path, 4)
    [path] = (tmp_path / "checkpoints" / "stage" / "4" / "position").rglob("metadata")
    position = json.loads(path.read_text())
    del position["fingerprints"], position["vector_size"]
    path.write_text(json.dumps(position))
    assert_same_bits(restore(tmp_path, make_state(0)), make_state(4))


def test_vectors_with_zeros_after_their_end(tmp_path):
    state = make_state(4, width=5)
    zeros = (0, 3)
    padded = state._replace(
        params=jnp.pad(state.params, zeros), average=jnp.pad(state.average, zeros)
    )
    with StageCheckpoints(tmp_path, "stage", SETTINGS) as checkpoints:
        checkpoints.save(padded, vector_size=5)
    assert_same_bits(restore(tmp_path, make_state(0, width=5)), state)
    with pytest.raises(InputError, match="does not fit this model"):
        restore(tmp_path, make_state(0, width=6))


# Where one write fails, Orbax abandons the others of its event loop: Python complains when it collects them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, capfd):
    """The limit of a file's size stands for a full disk: the write fails in the same place."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with StageCheckpoints(tmp_path, "stage", SETTINGS) as checkpoints:
        checkpoints.save(noise_state(4))
        checkpoints.finish()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
            checkpoints.save(noise_state(9))
            checkpoints.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert checkpoints.failure is not None
        folder = tmp_path / "checkpoints" / "stage"
        assert [path.name for path in folder.iterdir()] == ["4"]
        message = capfd.readouterr().err
        assert f"{folder / '9'} could not be written" in message
        assert "the newest is of step 4" in message
        assert errno.errorcode[errno.EFBIG] in message or "too large" in message.lower()
        # Training went on, and the disk has room again.
        checkpoints.save(noise_state(12))
        checkpoints.finish()
        assert checkpoints.failure is None
    assert_same_bits(restore(tmp_path, noise_state(0)), noise_state(12))
    gc.collect()
