"""A program that is killed at random and resumed, in small: the soak itself, and that it would see a difference."""

import sys

import pytest

from launch.soak import soak

COMMAND = [sys.executable, "-m", "tests.training.worker", "{workdir}", "plain"]
FLAGS = ["--steps=30", "--save_every=4", "--slow=0.02"]
# What it "trains" depends on how often it was started.
FORGETFUL = """
import json, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
workdir = pathlib.Path(sys.argv[1])
(workdir / "metrics").mkdir(parents=True, exist_ok=True)
starts = workdir / "starts"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
with (workdir / "metrics" / "a.jsonl").open("a") as file:
    for _ in range(20):
        file.write("{}\\n")
        file.flush()
        time.sleep(0.05)
folder = workdir / "checkpoints" / "a" / "1" / "position"
folder.mkdir(parents=True, exist_ok=True)
(folder / "metadata").write_text(json.dumps({"fingerprints": [starts.stat().st_size]}))
"""


def test_killed_and_resumed_is_the_same_to_the_last_bit(tmp_path):
    said = soak([*COMMAND, *FLAGS], tmp_path, kills=2, seed=0, rows=8)
    assert said.startswith("2 kills in ")
    assert said.endswith("1 results, all the same")


def test_a_difference_is_found_and_named(tmp_path):
    command = [sys.executable, "-c", FORGETFUL, "{workdir}"]
    with pytest.raises(SystemExit, match=r"after \d kills these differ: checkpoint a"):
        soak(command, tmp_path, kills=2, seed=0, rows=3)


def test_a_program_that_fails_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"ended with status 3: see .*whole\.log"):
        soak([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, kills=1, seed=0, rows=1)
