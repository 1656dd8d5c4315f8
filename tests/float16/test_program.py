"""The program itself, in the process without XLA's algebraic simplifier."""

import subprocess
import sys

from tests.support.tiny import ROOT


def test_without_the_algebraic_simplifier():
    done = subprocess.run(
        [sys.executable, "-m", "launch.fp16_stability", "--paths=jit_noalgsimp", "--sizes=144"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "float16, jit_noalgsimp" in done.stdout
    assert "0 failures, largest error allowed 0.400 %" in done.stdout
    # One line a family, and three errors for each operator: nothing was rewritten, so the oracle agrees to the bit.
    row = next(line for line in done.stdout.splitlines() if line.startswith("one-hot 6e4"))
    errors = row.removeprefix("one-hot 6e4").split()
    assert len(errors) == 7 * 3
    assert set(errors[2:15:3]) == {"0.000"}
