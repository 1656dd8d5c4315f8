"""Waiting for other processes and threads: no longer than they take, and long enough on a busy machine."""

import time

PATIENCE = 1800.0  # seconds; a core may be shared by ten


def wait_for(happened, said=lambda: "it never came"):
    """Asks again and again until the answer is true, and returns it; `said` is the message if it never is."""
    deadline = time.monotonic() + PATIENCE
    while not (answer := happened()):
        assert time.monotonic() < deadline, said()
        time.sleep(0.01)
    return answer
