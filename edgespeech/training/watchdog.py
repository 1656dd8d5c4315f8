"""What the threads of a program are inside of when training does not move."""

import contextlib
import faulthandler
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def watchdog(minutes: float) -> Iterator[Callable[[], None]]:
    """Prints the stacks of all threads to standard error after so many minutes without a sign of life, again and again.

    Args:
        minutes: more than a step and its compilation take; 0: never.

    Yields:
        The sign of life, to be given after every step.
    """
    if not minutes:
        yield lambda: None
        return

    def alive() -> None:
        faulthandler.dump_traceback_later(60 * minutes, repeat=True, file=2)

    alive()
    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()
