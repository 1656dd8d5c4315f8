"""Audio from the microphone, a block at a time, by the optional package `sounddevice`."""

import contextlib
import importlib
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from edgespeech.errors import InputError


class Microphone:
    """The default input device; nothing is recorded before `blocks`.

    Attributes:
        rate: of its audio, Hz.
        lost: how often the device had to drop audio.

    Raises:
        InputError: `sounddevice` is not installed or finds no PortAudio, or there is no input device.
    """

    def __init__(self):
        try:
            self._sounddevice: Any = importlib.import_module("sounddevice")
        except (
            ImportError,
            OSError,
        ) as error:  # OSError: the package is there, the library PortAudio is not
            raise InputError(
                f"the microphone needs the package sounddevice ({error}): pip install sounddevice, and on Linux "
                "install PortAudio (Debian: libportaudio2)"
            ) from error
        try:
            device = self._sounddevice.query_devices(kind="input")
        except (self._sounddevice.PortAudioError, ValueError) as error:
            raise InputError(
                f"there is no microphone ({error}): connect one, or name audio files"
            ) from error
        self.rate = round(device["default_samplerate"])
        self.lost = 0

    def blocks(self, stop: threading.Event) -> Iterator[np.ndarray]:
        """float32 `[t]` blocks in [-1, 1], mono, until `stop` is set or the device is gone.

        Raises:
            InputError: the device cannot be opened.
        """
        waiting: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()

        def receive(samples, count, time, status):  # called in a thread of PortAudio's
            self.lost += bool(status.input_overflow)
            waiting.put(samples[:, 0].copy())  # the buffer is used again

        try:
            stream = self._sounddevice.InputStream(
                samplerate=self.rate, channels=1, dtype="float32", callback=receive
            )
            with stream:
                while not stop.is_set() and stream.active:
                    with contextlib.suppress(queue.Empty):
                        yield waiting.get(timeout=0.1)
        except self._sounddevice.PortAudioError as error:
            raise InputError(
                f"the microphone cannot be used ({error}): is another program using it?"
            ) from error
        while not waiting.empty():
            yield waiting.get()


@contextlib.contextmanager
def until_ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, in place of an interrupt; a second one interrupts."""
    stop = threading.Event()

    def handle(number, frame):
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
