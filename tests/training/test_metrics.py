"""Metrics: rows written, resumed and repaired; events read back; progress off a terminal."""

import io
import json
import math
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from edgespeech.errors import InputError
from edgespeech.training import metrics
from edgespeech.training.metrics import MetricsWriter, Progress, read_metrics


def read_events(folder):
    """Decode TFRecord framing by hand: length, its CRC, payload, its CRC."""
    events = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return events


def test_write_and_read(tmp_path):
    with MetricsWriter(tmp_path, "sweep") as writer:
        writer.write(0, {"loss": np.float32(1.5), "rate": 1e-3})
        # Readable at once: a run killed now has lost nothing.
        assert read_metrics(writer.path) == [{"step": 0, "loss": 1.5, "rate": 1e-3}]
        writer.write(10, {"loss": np.array(0.25)})
    assert writer.path == tmp_path / "metrics" / "sweep.jsonl"
    assert read_metrics(writer.path)[1:] == [{"step": 10, "loss": 0.25}]

    events = read_events(tmp_path / "tensorboard" / "sweep")
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(0, "loss", 1.5), (0, "rate", pytest.approx(1e-3)), (10, "loss", 0.25)]


def test_resume_drops_later_rows_and_a_torn_line(tmp_path):
    with MetricsWriter(tmp_path, "train") as writer:
        for step in (0, 5, 10, 15):
            writer.write(step, {"loss": 100.0 + step})
    with writer.path.open("a") as file:
        file.write('{"step": 20, "lo')
    assert [row["step"] for row in read_metrics(writer.path)] == [0, 5, 10, 15]

    with MetricsWriter(tmp_path, "train", resume_step=10) as writer:
        writer.write(10, {"loss": 1.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(writer.path)] == [
        (0, 100.0),
        (5, 105.0),
        (10, 1.0),
    ]
    starts = [
        e.step for e in read_events(tmp_path / "tensorboard" / "train") if e.session_log.status
    ]
    assert starts == [0, 10]  # TensorBoard drops what comes at these steps or later before them

    with MetricsWriter(tmp_path, "train"):
        assert read_metrics(writer.path) == []


def test_not_finite_is_null_in_the_file(tmp_path):
    with MetricsWriter(tmp_path, "train") as writer:
        writer.write(1, {"loss": math.nan, "norm": math.inf, "rate": 0.5})

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(writer.path.read_text(), parse_constant=no_constant)
    assert row == {"step": 1, "loss": None, "norm": None, "rate": 0.5}
    (read,) = read_metrics(writer.path)
    assert math.isnan(read["loss"])
    assert math.isnan(read["norm"])
    with MetricsWriter(tmp_path, "train", resume_step=2):
        assert json.loads(writer.path.read_text()) == row


def test_bad_input(tmp_path):
    for stage in ("", "a/b", ".."):
        with pytest.raises(InputError, match="stage"):
            MetricsWriter(tmp_path, stage)
    with pytest.raises(InputError, match="resume_step -1"):
        MetricsWriter(tmp_path, "a", resume_step=-1)
    with MetricsWriter(tmp_path, "a") as writer, pytest.raises(InputError, match='called "step"'):
        writer.write(0, {"step": 1})
    with pytest.raises(InputError, match="no metrics at"):
        read_metrics(tmp_path / "none.jsonl")
    for line in ("loss 3", "[1]", '{"loss": 3}', "3"):
        writer.path.write_text('{"step": 0}\n' + line + '\n{"step": 1}\n')
        with pytest.raises(InputError, match="line 2 is not a row"):
            read_metrics(writer.path)


class Clock:
    """Stands in for the time module: tests of the intervals need no waiting."""

    now = 1000.0

    def monotonic(self):
        return self.now


def test_progress_prints_lines_off_a_terminal(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    stream = io.StringIO()
    with Progress("teacher", 100, initial=20, stream=stream) as progress:
        for done in range(21, 61):
            clock.now += 0.5
            progress.update(done, {"loss": np.float32(0.125)})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    # 20 steps in 10 s leave 60 steps = 30 s, then 40 steps = 20 s.
    assert "teacher" in lines[0]
    assert "40/100" in lines[0]
    assert "[00:10<00:30" in lines[0]
    assert "2.00step/s" in lines[0]
    assert "loss=0.125" in lines[0]
    assert "60/100" in lines[1]
    assert "[00:20<00:20" in lines[1]
    assert "\r" not in stream.getvalue()


def test_progress_prints_the_end_between_intervals(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    stream = io.StringIO()
    with Progress("sweep", 3, stream=stream) as progress:
        for done in (1, 2, 3):
            clock.now += 1.0
            progress.update(done)
    assert len(stream.getvalue().splitlines()) == 1
    assert "3/3 [00:03<00:00" in stream.getvalue()


def test_progress_bar_on_a_terminal():
    stream = io.StringIO()
    stream.isatty = lambda: True
    with Progress("teacher", 10, initial=2, stream=stream) as progress:
        progress.update(10, {"loss": 0.5})
    assert "10/10" in stream.getvalue()
    assert "loss=0.5" in stream.getvalue()
    assert "\r" in stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_quiet(terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    with Progress("teacher", 10, quiet=True, stream=stream) as progress:
        progress.update(10, {"loss": 0.5})
    assert stream.getvalue() == ""
