"""Which of the processes of a run live, and what became of the others."""

import json
import socket
import threading
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from edgespeech.training.distributed import Board

LOST = 75  # EX_TEMPFAIL of sysexits.h: starting again may help


class Verdict(NamedTuple):
    """Why this process cannot go on: a message, and the exit status."""

    message: str
    status: int


class Peers:
    """Says on the board that this process lives, and reads what the others say.

    Args:
        board: where the processes meet.
        process_id: of this one, from 0.
        num_processes: of the run.
        timeout: seconds without a sign of life after which a process counts as dead.
        clock: seconds, from anywhere.
    """

    def __init__(
        self,
        board: Board,
        process_id: int,
        num_processes: int,
        timeout: float,
        clock: Callable[[], float] = monotonic,
    ):
        self._board, self._id, self._count = board, process_id, num_processes
        self._timeout, self._clock = timeout, clock
        self._beats = 0
        # The first last word stands: the watching thread may be about to say that this process lives, or is done.
        self._lock = threading.Lock()
        self._is_over = False
        self._heard: dict[int, tuple[int, float]] = {}
        self._dead: set[int] = set()

    def hurry(self, timeout: float) -> None:
        """Counts a process as dead sooner."""
        self._timeout = min(timeout, self._timeout)

    def live(self) -> None:
        """Says that this process lives, unless it has said its last word."""
        with self._lock:
            if not self._is_over:
                self._beats += 1
                self._say(state="lives")

    def end(self) -> None:
        """Says that this process is done: its silence from now on means nothing."""
        self._say_last(state="done")

    def fail(self, message: str, status: int) -> None:
        """Says that this process ends with an error, which ends the others with the same status."""
        self._say_last(state="failed", message=message, status=status)

    def _say_last(self, **entry) -> None:
        with self._lock:
            if not self._is_over:
                self._is_over = True
                self._say(**entry)

    def _say(self, **entry) -> None:
        entry |= {"beat": self._beats, "host": socket.gethostname()}
        self._board.put(f"peers/{self._id}", json.dumps(entry))

    def all_done(self) -> bool:
        """Whether all others have ended in one way or another."""
        entries = self._entries()
        return all(
            entries.get(other, {}).get("state", "lives") != "lives"
            for other in range(self._count)
            if other != self._id and other not in self._dead
        )

    def _entries(self) -> dict[int, dict]:
        return {int(name): json.loads(text) for name, text in self._board.read("peers").items()}

    def judge(self) -> Verdict | None:
        """None while all others live or are done."""
        entries, now = self._entries(), self._clock()
        for other in range(self._count):
            if other == self._id:
                continue
            entry = entries.get(other, {})
            name = f"process {other} of {self._count}"
            if "host" in entry:
                name += f" (on {entry['host']})"
            if entry.get("state") == "done":
                continue
            if entry.get("state") == "failed":
                return Verdict(f"{name} stopped: {entry['message']}", entry["status"])
            beat, since = self._heard.get(other, (None, now))
            if beat != entry.get("beat", 0):
                self._heard[other] = (entry.get("beat", 0), now)
            elif now - since > self._timeout:
                self._dead.add(other)
                return Verdict(
                    f"{name} has given no sign of life for {now - since:.0f} s; this process stops too: "
                    "start all again with --resume",
                    LOST,
                )
        return None
