"""Signals of processes that tests start."""

import signal


def hear_ctrl_c() -> None:
    """For `preexec_fn`: a shell starts what runs in the background deaf to Ctrl-C, and children inherit it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
