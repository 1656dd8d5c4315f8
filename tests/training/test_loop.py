"""The loop: an interrupted or killed run goes on bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from edgespeech.errors import InputError
from edgespeech.training import stopping
from edgespeech.training.metrics import read_metrics
from edgespeech.training.stopping import Stopped
from edgespeech.training.watch import Watch
from tests.support.tiny import ROOT, ToneCorpus, assert_same_bits, tone_source
from tests.support.train_tiny import run
from tests.support.waiting import PATIENCE, wait_for

STEPS = 9


def rows(workdir):
    return read_metrics(workdir / "metrics" / "teacher.jsonl")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The state after all steps, its metrics, and the folder."""
    workdir = tmp_path_factory.mktemp("unbroken")
    return run(workdir, STEPS), rows(workdir), workdir


def test_loss_falls_and_every_step_is_logged(unbroken):
    state, metrics, _ = unbroken
    assert [row["step"] for row in metrics] == list(range(STEPS))
    assert int(state.step) == STEPS
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert all(row["skipped"] == 0 for row in metrics)


@pytest.mark.parametrize("step", [0, 4])
def test_interrupt_in_prepare_then_resume(unbroken, tmp_path, step):
    calls = iter(range(STEPS))

    def interrupt(batch):
        if next(calls) == step:
            raise KeyboardInterrupt
        return batch

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, STEPS, prepare=interrupt)
    # The last full step was saved, though it is not a multiple of save_every.
    assert [row["step"] for row in rows(tmp_path)] == list(range(step))
    assert (tmp_path / "checkpoints" / "teacher" / str(step)).is_dir()
    resumed_from = []
    state = run(tmp_path, STEPS, prepare=lambda batch: resumed_from.append(1) or batch)
    assert len(resumed_from) == STEPS - step
    assert_same_bits(state, unbroken[0])
    assert rows(tmp_path) == unbroken[1]


def test_error_of_the_data_then_resume(unbroken, tmp_path, monkeypatch):
    served = []

    def failing(self, index, audio=ToneCorpus.audio):
        served.append(index)
        if len(served) == 20:
            raise OSError("the disk is gone")
        return audio(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(ToneCorpus, "audio", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            run(tmp_path, STEPS)
    assert 0 < len(rows(tmp_path)) < STEPS
    assert_same_bits(run(tmp_path, STEPS), unbroken[0])
    assert rows(tmp_path) == unbroken[1]


def test_runs_in_parts_and_a_finished_run_stays(unbroken, tmp_path):
    run(tmp_path, 2, total=STEPS)
    run(tmp_path, 5, total=STEPS)
    state = run(tmp_path, STEPS)
    assert_same_bits(state, unbroken[0])
    again = run(tmp_path, STEPS, prepare=lambda batch: pytest.fail("nothing is left to do"))
    assert_same_bits(again, unbroken[0])
    # Asked for less than there is: the newest state, nothing undone.
    assert_same_bits(run(tmp_path, 2, total=STEPS), unbroken[0])
    assert rows(tmp_path) == unbroken[1]


def test_killed_in_mid_run_then_resume(unbroken, tmp_path):
    command = [sys.executable, "-m", "tests.support.train_tiny", str(tmp_path)]
    command += ["--steps", str(STEPS)]
    # Any step will do: the result may not depend on it.
    step = random.randrange(1, STEPS - 2)
    path = tmp_path / "metrics" / "teacher.jsonl"
    process = subprocess.Popen([*command, "--slow"], cwd=ROOT)
    try:
        wait_for(lambda: path.exists() and path.read_text().count("\n") > step)
        assert process.poll() is None
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "state.npz").exists()
    assert len(rows(tmp_path)) < STEPS, f"killed too late, at {len(rows(tmp_path))}"

    subprocess.run(command, check=True, cwd=ROOT)
    with np.load(tmp_path / "state.npz") as saved:
        leaves = [saved[f"leaf{i}"] for i in range(len(saved))]
    assert_same_bits(leaves, jax.tree.leaves(unbroken[0]))
    assert rows(tmp_path) == unbroken[1], f"killed after step {step}"


def test_told_to_stop_then_resume(unbroken, tmp_path):
    """SIGTERM in this process, as a scheduler sends it before it takes the machine away."""
    calls = iter(range(STEPS))

    def terminate(batch):
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            # The watch's thread is told at once; here it is given the time to answer.
            wait_for(lambda: stopping.current()._answered)
        return batch

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped, Watch(60.0):
        run(tmp_path, STEPS, prepare=terminate)
    assert stopped.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    # The step in which it came is done and saved, no other was begun.
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3, 4]
    assert (tmp_path / "checkpoints" / "teacher" / "5").is_dir()
    assert_same_bits(run(tmp_path, STEPS), unbroken[0])
    assert rows(tmp_path) == unbroken[1]


def evaluate_for_minutes():
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(60_000):  # in Python, where its handler gets a turn
        time.sleep(0.01)


def test_told_to_stop_outside_of_training():
    with pytest.raises(Stopped), Watch(60.0):
        evaluate_for_minutes()


# A mutex that is locked twice holds the main thread as a long compilation does: in native code, deaf to signals.
COMPILING = """
import ctypes
from edgespeech.training import watch
watch.UNWIND_SECONDS = 0.1
mutex, lock = ctypes.create_string_buffer(256), ctypes.CDLL(None).pthread_mutex_lock
with watch.Watch(60.0):
    lock(mutex)
    print("compiling", flush=True)
    lock(mutex)
"""


def test_told_to_stop_within_a_compilation():
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILING],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout.readline() == "compiling\n"
    process.terminate()
    try:
        assert process.communicate(timeout=PATIENCE)[1] == "stopped: add --resume to go on\n"
    finally:
        process.kill()
    assert process.returncode == 0


def test_utterances_of_a_skipped_step_are_written_down(tmp_path, capfd):
    def spoil(batch):
        step = next(calls)
        return batch._replace(audio=batch.audio * np.float32("nan")) if step in (1, 6) else batch

    calls = iter(range(2))
    run(tmp_path, 2, total=STEPS, prepare=spoil, quiet=False)
    calls = iter(range(2, STEPS))
    run(tmp_path, STEPS, prepare=spoil, quiet=False)
    assert [row["skipped"] for row in rows(tmp_path)] == [0, 1, 0, 0, 0, 0, 1, 0, 0]
    lines = (tmp_path / "skipped" / "teacher.jsonl").read_text().splitlines()
    source = tone_source(batch_multiple=4)
    expected = []
    for step in (1, 6):
        index = source.batch(step).index
        ids = [source.corpus.utterances[row].id for row in index if row >= 0]
        expected.append({"step": step, "utterances": ids})
    assert [json.loads(line) for line in lines] == expected
    message = "step 6 of teacher was not finite and changed nothing; its utterances: "
    assert message + " ".join(expected[1]["utterances"]) in capfd.readouterr().err


def test_batches_that_the_devices_do_not_divide_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("edgespeech.training.loop.row_shards", lambda mesh: 3)
    with pytest.raises(InputError, match="batches of 4 rows cannot be cut for 3 devices"):
        run(tmp_path, STEPS)


def test_the_time_is_written_beside_the_metrics(unbroken):
    timing = read_metrics(unbroken[2] / "timing" / "teacher.jsonl")
    assert [row["step"] for row in timing] == list(range(STEPS))
    assert timing[0]["compile_seconds"] > 0
    assert all(row["compile_seconds"] == 0 for row in timing[1:])
    # Saved after every third step.
    assert [row["step"] for row in timing if row["checkpoint_seconds"] > 0] == [3, 6]
    assert all(0 < row["goodput"] < 1 for row in timing)


def test_the_position_in_the_data_is_saved(tmp_path):
    run(tmp_path, 2, total=STEPS)
    position = json.loads(
        next((tmp_path / "checkpoints" / "teacher" / "2").rglob("metadata")).read_text()
    )
    assert position["next_index"] == 2
