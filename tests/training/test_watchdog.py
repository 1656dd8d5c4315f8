"""The watchdog prints where the threads are when nothing moves, and is silent otherwise."""

import subprocess
import sys

import pytest

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


def start(minutes, seconds):
    code = SLEEP.format(minutes=minutes, seconds=seconds)
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_stacks_of_a_step_that_does_not_end():
    process = start(0.1 / 60, 600)
    printed = ""
    for line in process.stderr:
        printed += line
        if printed.count("Timeout (0:00:00.1") == 3:  # again and again
            break
    process.kill()
    process.communicate()
    assert printed.count("in stuck_here") >= 2


@pytest.mark.parametrize(("minutes", "seconds"), [(10, 0.1), (0, 0.3)])
def test_silent_while_steps_end_and_when_it_is_off(minutes, seconds):
    process = start(minutes, seconds)
    assert process.communicate()[1] == ""
    assert process.returncode == 0
