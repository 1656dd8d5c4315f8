"""The thread that watches over a program: signals to stop, the other processes, and the orderly end of all."""

import os
import select
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

import jax

from edgespeech.training import stopping
from edgespeech.training.distributed import Board
from edgespeech.training.peers import LOST, Peers
from edgespeech.training.stopping import Stopped, Stopper

UNWIND_SECONDS = 5.0  # given to the main thread, which may be inside a long compilation
SILENT_BEATS = 5  # missed by a process when an operation of all has failed: it is dead
GOODBYE_SECONDS = 10.0  # for the others to read why process 0 ends: it holds the board


class Watch:
    """Context manager around a program; enter it in the main thread, after the processes have met.

    SIGTERM, and Ctrl-C where there are several processes, stop the run by way of `Stopper`. A process that dies, hangs
    or fails ends the others with a message that names it.

    Args:
        heartbeat_seconds: without a sign of life after which a process counts as dead.
    """

    def __init__(self, heartbeat_seconds: float):
        count, index = jax.process_count(), jax.process_index()
        board = Board()
        self._stopper = Stopper(board, index, count)
        self._peers = Peers(board, index, count, heartbeat_seconds) if count > 1 else None
        # Every process reads what all have written.
        self._interval = max(1.0, count / 32) if count > 1 else None
        self._signals = (signal.SIGTERM, signal.SIGINT) if count > 1 else (signal.SIGTERM,)
        self._closed = threading.Event()

    def __enter__(self) -> "Watch":
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        # Written to at once, whatever the main thread is inside of; handlers wait for its next line of Python.
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self._handle) for number in self._signals}
        self._put_back = stopping.use(self._stopper)
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._closed.set()
        self._write.send(b"\0")
        self._thread.join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._put_back()
        self._read.close()
        self._write.close()
        if self._peers is not None and kind is None:
            self._peers.end()

    @property
    def together(self) -> bool:
        """There are several processes."""
        return self._peers is not None

    def explain(self, error: Exception) -> None:
        """Waits for word of another process that died, which is what made an operation of all fail.

        Returns where there is none: the error is this process's own.
        """
        if self._peers is not None and isinstance(error, jax.errors.JaxRuntimeError):
            seconds = SILENT_BEATS * (self._interval or 1.0)
            self._peers.hurry(seconds)
            time.sleep(2 * seconds)

    def leave(self, status: int, message: str) -> NoReturn:
        """Ends this process, one of several, at once: the others are told, and what may wait for them is not joined."""
        assert self._peers is not None
        if status:
            self._peers.fail(message, status)
        else:
            self._peers.end()
        self._end(status)

    def _handle(self, number, frame) -> None:
        if self._stopper.at_once and not self._closed.is_set():
            raise Stopped(0)

    def _run(self) -> None:
        while not self._closed.is_set():
            ready, _, _ = select.select([self._read], [], [], self._interval)
            if ready and set(self._read.recv(64)) & set(self._signals):
                self._stopper.request(f"process {jax.process_index()}")
            try:
                self._stopper.look()
                verdict = None
                if self._peers is not None:
                    self._peers.live()
                    verdict = self._peers.judge()
            except jax.errors.JaxRuntimeError as error:
                verdict = (f"process 0, the coordinator, does not answer: {error}", LOST)
            if self._closed.is_set():
                return
            if verdict is not None:
                print(f"error: {verdict[0]}", file=sys.stderr, flush=True)
                if self._peers is not None:
                    self._peers.end()
                self._end(verdict[1])
            if self._stopper.at_once:
                signal.pthread_kill(self._main, signal.SIGTERM)
                if not self._closed.wait(UNWIND_SECONDS):
                    print("stopped: add --resume to go on", file=sys.stderr)
                    if self._peers is not None:
                        self._peers.end()
                    self._end(0)

    def _end(self, status: int) -> NoReturn:
        if self._peers is not None and jax.process_index() == 0:
            deadline = time.monotonic() + GOODBYE_SECONDS
            while time.monotonic() < deadline and not self._peers.all_done():
                time.sleep(0.2)
            time.sleep(0.5)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
