"""Runs of a program in a process of their own: see `run_programs`."""

import json
import os
import subprocess
import sys

from tests.support.tiny import ROOT


def run_apart(program, asked, **environment):
    """The outcomes of runs that are asked for, in order; both have the form that `run_programs` describes.

    Args:
        program: name of the module.
        asked: runs; one may be its list of arguments alone.
        environment: variables beside those of this process.
    """
    asked = [{"arguments": a, "stop_at": None} if isinstance(a, list) else a for a in asked]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.run_programs", program],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
