"""Signals of processes that tests start."""

import sys
from collections.abc import Sequence

HEAR = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def hearing_ctrl_c(command: Sequence[str]) -> list[str]:
    """A command that starts another, in the same process, with Ctrl-C switched on.

    A shell starts what runs in the background deaf to it, and children inherit that.
    """
    return [sys.executable, "-c", HEAR, *command]
