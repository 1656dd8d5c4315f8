"""Weights & Biases gets what TensorBoard gets, in one run a stage; the package itself, or a stand-in for its calls."""

import importlib.util
import struct
import sys
import types

import pytest

from edgespeech.errors import InputError
from edgespeech.training import wandb_log
from edgespeech.training.loop import LoopConfig
from edgespeech.training.metrics import read_metrics
from tests.support.programs import run_inside
from tests.training import worker

LISTED = {  # by the project's issue on scale
    *("loss", "gradient_norm", "learning_rate", "skipped"),
    *("timing/utterances_per_second", "timing/utterances_per_second_per_device"),
    *("timing/audio_seconds_per_second", "timing/audio_seconds_per_second_per_device"),
    *("timing/padding", "timing/goodput", "timing/compile_seconds"),
    *("timing/data_seconds", "timing/compute_seconds", "timing/checkpoint_seconds"),
}


class StandIn:
    """`wandb` as far as it is used: notes the runs, and gathers the rows of a step as the package does."""

    class Error(Exception):
        pass

    def __init__(self):
        self.runs = []

    def init(self, **settings):
        run = types.SimpleNamespace(settings=settings, rows={}, status=None)
        run.log = lambda values, step: run.rows.setdefault(step, {}).update(values)
        run.finish = lambda exit_code: setattr(run, "status", exit_code)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def train(workdir, steps, prepare=None):
    config = LoopConfig(save_every=1000, log_every=2, quiet=True, wandb_project="speech")
    worker.fit("stage", "plain", workdir, steps, config, prepare)


def rows_on_disk(workdir):
    rows = {row["step"]: row for row in read_metrics(workdir / "metrics" / "stage.jsonl")}
    for row in read_metrics(workdir / "timing" / "stage.jsonl"):
        rows[row["step"]] |= {f"timing/{k}": v for k, v in row.items() if k != "step"}
    return {step: {k: v for k, v in row.items() if k != "step"} for step, row in rows.items()}


def test_every_row_in_one_run_of_the_stage(tmp_path, wandb):
    train(tmp_path / "work", 4)
    (run,) = wandb.runs
    assert run.settings["project"] == "speech"
    assert (run.settings["group"], run.settings["name"]) == ("work", "work/stage")
    assert run.settings["dir"] == tmp_path / "work"
    assert run.rows == rows_on_disk(tmp_path / "work")
    assert list(run.rows) == [1, 3]
    assert set(run.rows[3]) == LISTED
    assert run.status == 0


def test_a_resumed_stage_goes_on_in_its_run_and_a_new_one_does_not(tmp_path, wandb):
    calls = []

    def interrupt(batch):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 4, interrupt)
    train(tmp_path, 4)
    worker.fit(
        "other", "plain", tmp_path, 1, LoopConfig(log_every=1, quiet=True, wandb_project="speech")
    )
    first, second, other = wandb.runs
    assert (first.status, second.status) == (1, 0)
    assert first.settings == second.settings
    assert first.settings["resume"] == "allow"
    assert other.settings["id"] != first.settings["id"]
    assert first.rows | second.rows == rows_on_disk(tmp_path)


def test_what_the_package_refuses_is_said(tmp_path, wandb, monkeypatch):
    def refuse(**_):
        raise StandIn.Error("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        InputError, match="--wandb_project=speech: no API key; the fix: `wandb login`"
    ):
        train(tmp_path, 4)


def test_a_missing_package_is_said_before_anything_else(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        wandb_log, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    arguments = [f"--workdir={tmp_path / 'work'}", f"--cache_dir={tmp_path}", "--wandb_project=x"]
    status, _, printed = run_inside(arguments, monkeypatch, capsys)
    assert status == 2
    assert "--wandb_project=x needs a package that is not installed: pip install" in printed
    assert not (tmp_path / "work").exists()
    wandb_log.require_wandb(None)


def framed(content):
    """Records of LevelDB's log format behind a header of 7 bytes: CRC, length and kind, in blocks of 32 KiB."""
    at, record = 7, b""
    while at < len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_the_package_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    train(tmp_path, 4)
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = {}
    for data in framed(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {
                i.key or ".".join(i.nested_key): float(i.value_json) for i in record.history.item
            }
            step = int(items.pop("_step"))
            rows[step] = {k: v for k, v in items.items() if not k.startswith("_")}
    expected = rows_on_disk(tmp_path)
    assert rows.keys() == expected.keys() == {1, 3}
    for step, row in expected.items():
        assert rows[step] == pytest.approx(row)
