"""How a run that is told to stop ends at one and the same step on all hosts, with that step saved.

A host that is told (SIGTERM before a preemption, say) asks on the board. Each process then answers with the number of
steps that it has begun, and begins no other until all have answered: they stop after the largest number. A process
without an unsaved step answers `clean`: then no process has finished a step since the last checkpoint, since a step
needs all, and they stop at once.
"""

import threading
from collections.abc import Callable

from edgespeech.training.distributed import Board

CLEAN = "clean"
NOW = -1


class Stopped(SystemExit):
    """The run was told to stop, and everything is saved; the exit status is 0."""


class Stopper:
    """One process's part in stopping. Its thread calls `look` now and then, its training the rest.

    Args:
        board: where the processes meet.
        process_id: of this one, from 0.
        num_processes: of the run.
    """

    def __init__(self, board: Board, process_id: int = 0, num_processes: int = 1):
        self._board, self._id, self._count = board, process_id, num_processes
        self._changed = threading.Condition()
        self._begun = 0
        self._unsaved = False
        self._answered = False
        self._last: int | None = None

    @property
    def at_once(self) -> bool:
        """The run ends here: there is nothing to save."""
        return self._last == NOW

    def request(self, reason: str) -> None:
        """Asks all processes to stop."""
        self._board.put("stop/asked", reason)

    def look(self) -> None:
        """Answers if someone has asked, and works out the last step from the answers."""
        if not self._board.read("stop"):
            return
        with self._changed:
            if not self._answered:
                answer = str(self._begun) if self._unsaved else CLEAN
                self._board.put(f"stopping/{self._id}", answer)
                self._answered = True
            answers = self._board.read("stopping").values()
            if CLEAN in answers:
                self._last = NOW
            elif len(answers) == self._count:
                self._last = max(map(int, answers))
            self._changed.notify_all()

    def stop_here(self) -> bool:
        """Before a step: True if the step before was the last one; otherwise this step counts as begun."""
        with self._changed:
            self._changed.wait_for(lambda: not self._answered or self._last is not None)
            if self._last is not None and self._begun >= self._last:
                return True
            self._begun += 1
            return False

    def unsaved(self) -> None:
        """After a step: there is something to save."""
        with self._changed:
            # Answered `clean` already: what was begun since cannot end without the others.
            self._changed.wait_for(lambda: not self._answered or self._last is not None)
            if self._last == NOW:
                raise Stopped(0)
            self._unsaved = True

    def saved(self) -> None:
        """After a checkpoint is written.

        Raises:
            Stopped: the run is to stop.
        """
        with self._changed:
            self._unsaved = False
            if self._answered:
                raise Stopped(0)


_current = Stopper(Board())


def current() -> Stopper:
    """The one that training asks; it is told nothing unless a program watches for signals."""
    return _current


def use(stopper: Stopper) -> Callable[[], None]:
    """Makes a stopper the current one; returns what puts the one before back."""
    global _current
    before, _current = _current, stopper

    def put_back() -> None:
        global _current
        _current = before

    return put_back
