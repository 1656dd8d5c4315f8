"""The watchdog prints where the threads are when nothing moves, and is silent otherwise."""

import subprocess
import sys

from tests.support.tiny import ROOT

SLEEP = """
import time
from edgespeech.training.watchdog import watchdog
def stuck_here(seconds): time.sleep(seconds)
with watchdog({minutes}) as alive:
    alive()
    stuck_here({seconds})
time.sleep(0.3)
"""


def stderr(minutes, seconds):
    code = SLEEP.format(minutes=minutes, seconds=seconds)
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stderr


def test_stacks_of_a_step_that_does_not_end():
    printed = stderr(0.1 / 60, 0.6)
    assert printed.count("Timeout (0:00:00.1") > 1  # again and again
    assert "in stuck_here" in printed


def test_silent_while_steps_end_and_when_it_is_off():
    assert stderr(10, 0.1) == ""
    assert stderr(0, 0.3) == ""
