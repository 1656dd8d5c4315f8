"""The folder of a run with one process and with several, and the number of rows that goes with the devices."""

import json

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from edgespeech.errors import InputError
from edgespeech.training.loop import LoopConfig
from experiments import distributed_flags, run
from tests.support.programs import TINY_RUN, run_inside

FLAGS = flags.FLAGS


@pytest.fixture
def workdir(tmp_path):
    """Flags as a program has them that was started with --workdir alone."""
    with flagsaver.flagsaver():
        FLAGS.mark_as_parsed()
        FLAGS.workdir = str(tmp_path / "run")
        FLAGS.resume, FLAGS.batch_multiple, FLAGS.model_parallel = False, None, 1
        yield tmp_path / "run"


def begin(workdir, **settings):
    run.Workdir(workdir, settings, resume=False).begin()


def test_rows_are_a_multiple_of_the_devices(workdir, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert run.batch_multiple() == 8
    FLAGS.batch_multiple, FLAGS.model_parallel = None, 2
    assert run.batch_multiple() == 4


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_run_goes_on_with_the_rows_it_began_with(workdir, monkeypatch, devices):
    begin(workdir, batch_multiple=4)
    FLAGS.resume = True
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert run.batch_multiple() == 4


def test_devices_that_do_not_divide_the_rows_are_refused(workdir, monkeypatch):
    begin(workdir, batch_multiple=4)
    FLAGS.resume = True
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    with pytest.raises(InputError, match="a multiple of 4, and there are 3 devices"):
        run.batch_multiple()


def test_a_run_older_than_the_flag_goes_on(workdir, monkeypatch):
    begin(workdir, steps=7)
    FLAGS.resume = True
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert run.batch_multiple() == 2
    run.Workdir(workdir, {"steps": 7, "batch_multiple": 2}, resume=True)
    with pytest.raises(InputError, match="steps was 7, is 8"):
        run.Workdir(workdir, {"steps": 8, "batch_multiple": 2}, resume=True)


def test_another_number_of_rows_is_refused(workdir):
    begin(workdir, batch_multiple=4)
    with pytest.raises(InputError, match="batch_multiple was 4, is 8"):
        run.Workdir(workdir, {"batch_multiple": 8}, resume=True)


def test_another_process_works_in_a_copy_and_shares_the_checkpoints(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    begin(workdir)
    for name in ("hypotheses/a.jsonl", "teacher/model.json", "checkpoints/s/3/x", "plots/p.png"):
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).write_text(name)
    before = {path: path.read_text() for path in workdir.rglob("*") if path.is_file()}
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    copy = run.Workdir(workdir, {}, resume=True)
    assert tmp_path / "temporary" in copy.path.parents
    # What decides what is still to be done is there, and may be written to.
    assert (copy.path / "hypotheses" / "a.jsonl").read_text() == "hypotheses/a.jsonl"
    assert (copy.path / "teacher" / "model.json").exists()
    assert not (copy.path / "plots").exists()
    checkpoints = (copy.path / "checkpoints" / "s").resolve()
    assert checkpoints == (workdir / "checkpoints" / "s").resolve()
    (copy.path / "hypotheses" / "a.jsonl").write_text("other")
    copy.write_json("config.json", {"other": 1})
    assert {path: path.read_text() for path in workdir.rglob("*") if path.is_file()} == before
    # Started again, it finds the run's folder as it is then.
    (workdir / "hypotheses" / "a.jsonl").write_text("new")
    again = run.Workdir(workdir, {}, resume=True)
    assert again.path == copy.path
    assert (again.path / "hypotheses" / "a.jsonl").read_text() == "new"
    assert json.loads((again.path / "config.json").read_text()) == {}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--coordinator=a:1", "--coordinator without --num_processes, --process_id: give all"),
        ("--fsdp=0", "fsdp=0"),
        ("--batch_multiple=0", "batch_multiple=0"),
        ("--watchdog_minutes=-1", "watchdog_minutes=-1"),
    ],
)
def test_wrong_flags(tmp_path, monkeypatch, capsys, flag, message):
    fixed = [f"--workdir={tmp_path / 'run'}", f"--cache_dir={tmp_path / 'cache'}"]
    status, _, error = run_inside([*fixed, *TINY_RUN, flag], monkeypatch, capsys)
    assert status == 2
    assert message in error
    assert not (tmp_path / "run").exists()


def test_settings_of_the_loop_are_flags_that_a_resume_may_change(workdir):
    given = {
        "save_every": 7,
        "quiet": True,
        "fsdp": 2,
        "model_parallel": 2,
        "watchdog_minutes": 3.0,
        "data_threads": 5,
        "remat": True,
        "profile_steps": 4,
        "profile_from": 6,
        "wandb_project": "speech",
    }
    for name, value in given.items():
        setattr(FLAGS, name, value)
    expected = {"threads" if name == "data_threads" else name: v for name, v in given.items()}
    assert distributed_flags.loop_config() == LoopConfig(**expected)
    assert given.keys() - {"save_every", "quiet"} <= distributed_flags.FREE
