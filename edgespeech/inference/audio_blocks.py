"""Audio files of any length, a block at a time: reading, resampling, overlapped segments."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from edgespeech.data.audio import require_rate
from edgespeech.errors import InputError

BLOCK = 1 << 16  # samples read or written at once


def unreadable(path: Path, reason: object) -> InputError:
    """The error of a file that gives no audio."""
    return InputError(f"{path}: unreadable audio ({reason}); the fix: valid WAV, FLAC, Ogg or MP3")


def open_sound(path: Path) -> soundfile.SoundFile:
    """Opens a file of audio.

    Raises:
        InputError: it is missing or unreadable.
    """
    try:
        return soundfile.SoundFile(path)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise unreadable(path, error if path.exists() else "no such file") from error


def require_overlap(segment_seconds: float, overlap_seconds: float) -> None:
    """Checks that segments can share so much.

    Raises:
        InputError: the overlap is not between 0 and half a segment.
    """
    if not 0 < overlap_seconds <= segment_seconds / 2 < math.inf:
        raise InputError(
            f"an overlap of {overlap_seconds:g} s does not fit segments of {segment_seconds:g} s: choose more than "
            f"0 and at most {segment_seconds / 2:g} s"
        )


def read_blocks(sound: soundfile.SoundFile, path: Path) -> Iterator[np.ndarray]:
    """float32 `[c n]` blocks of a file."""
    require_rate(path, sound.samplerate)
    size = max(1, BLOCK // sound.channels)
    empty = True
    try:
        while len(block := sound.read(size, dtype="float32", always_2d=True)):
            if not np.isfinite(block).all():
                raise unreadable(path, "NaN or infinite samples")
            empty = False
            yield block.T
    except soundfile.SoundFileError as error:
        raise unreadable(path, error) from error
    if empty:
        raise unreadable(path, "no samples")


def resampled(
    blocks: Iterable[np.ndarray], channels: int, rate: int, new_rate: int
) -> Iterator[np.ndarray]:
    """Blocks `[c n]` at another rate (Hz)."""
    if rate == new_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, new_rate, channels, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(np.ascontiguousarray(block.T)).reshape(-1, channels).T
    rest = stream.resample_chunk(np.zeros((0, channels), np.float32), last=True)
    yield rest.reshape(-1, channels).T


def cut(blocks: Iterable[np.ndarray], segment: int, hop: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Segments `[c segment]` that start every `hop` samples, and whether it is the last, which may be shorter."""
    held: np.ndarray | None = None
    for block in blocks:
        held = block if held is None else np.concatenate([held, block], axis=1)
        while held.shape[1] > segment:  # there is more to come after this one
            yield held[:, :segment], False
            held = held[:, hop:]
    if held is not None and held.shape[1]:
        yield held, True
