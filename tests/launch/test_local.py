"""The launcher of local processes: flags, prefixes, exit status, signals, and no survivors."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.signals import hearing_ctrl_c
from tests.support.tiny import ROOT
from tests.support.waiting import PATIENCE, wait_for

SHOW = (
    "import os, sys; print(*sys.argv[1:], os.environ['JAX_NUM_CPU_DEVICES']); print('half', end='')"
)
SLEEP = "import time; print('up', flush=True); time.sleep(600)"
# Process 1 fails when process 0 listens; that would go on for ever, and says so when it is told to stop.
FAIL = """
import pathlib, signal, sys, time
listening = pathlib.Path(sys.argv[1])
if '--process_id=1' in sys.argv:
    while not listening.exists(): time.sleep(0.01)
    sys.exit(7)
def stop(*_): print('told', flush=True); sys.exit(0)
signal.signal(signal.SIGTERM, stop)
listening.touch()
time.sleep(600)
"""
# Heeds no SIGTERM.
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
KILLED = "import os, sys, time; '--process_id=0' in sys.argv and os.kill(os.getpid(), 9); time.sleep(600)"


def command(code, *flags, arguments=()):
    launcher = [sys.executable, "-m", "launch.local", *flags]
    return [*launcher, "--", sys.executable, "-c", code, *arguments]


def launch(code, *flags, **options):
    return subprocess.run(
        command(code, *flags, **options), capture_output=True, text=True, cwd=ROOT
    )


def test_every_process_learns_its_place_and_its_lines_carry_its_number():
    done = launch(SHOW, "--processes=3", "--devices_per_process=2")
    assert done.returncode == 0
    lines = sorted(done.stdout.splitlines())
    ports = set()
    for index in range(3):
        [first, second] = [line for line in lines if line.startswith(f"[{index}] ")]
        place = rf"--coordinator=127\.0\.0\.1:(\d+) --num_processes=3 --process_id={index} 2"
        match = re.fullmatch(rf"\[{index}\] {place}", first)
        assert match
        ports.add(match[1])
        assert second == f"[{index}] half"
    assert len(ports) == 1


def test_the_first_failure_is_the_status_and_ends_the_others(tmp_path):
    done = launch(FAIL, "--grace_seconds=5", arguments=[str(tmp_path / "listening")])
    assert done.returncode == 7
    assert "process 1 of 2 ended with status 7" in done.stderr
    assert "[0] told" in done.stdout


def test_killed_counts_as_failed_and_the_deaf_are_killed():
    done = launch(KILLED, "--grace_seconds=0.2")
    assert done.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_handed_on(number):
    with subprocess.Popen(
        hearing_ctrl_c(command(SLEEP)), stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        process.send_signal(number)
        expected = 128 + signal.SIGTERM if number == signal.SIGTERM else 1
        try:
            # Python ends with the signal itself after a Ctrl-C that it did not catch.
            assert process.wait(PATIENCE) in (expected, 128 + signal.SIGINT)
        finally:
            process.terminate()  # a launcher that is told so ends its children


def test_nobody_survives():
    flags = ("--grace_seconds=0.2",)
    with subprocess.Popen(
        command(DEAF, *flags), stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not path.exists():
            pytest.skip("children are listed on Linux alone")
        children = [int(pid) for pid in path.read_text().split()]
        assert len(children) == 2
        os.kill(children[0], signal.SIGKILL)
        assert process.wait(PATIENCE) == 128 + signal.SIGKILL
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command"),
        (["--processes=0", "--", "true"], "--processes=0: give at least 1"),
        (["--devices_per_process=0", "--", "true"], "--devices_per_process=0"),
    ],
)
def test_wrong_arguments(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert message in done.stderr
