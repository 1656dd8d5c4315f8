"""Reading audio files as 16 kHz mono, and changing the speed of audio."""

import functools
import os
from fractions import Fraction
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr

from edgespeech.errors import InputError

SAMPLE_RATE = (
    16_000  # as in edgespeech.types, which this package cannot import because it imports JAX
)
# Lossy codecs and resampling overshoot 1 a little; integers stored as floats exceed it by far.
MAX_AMPLITUDE = 2.0
RATES = (4_000, 384_000)  # Hz: from others, a small file would become a large array
MOST_SECONDS = 3600.0  # of a file that is held whole: a small one may hold years of silence
_BLOCK = 1 << 20  # samples of all channels read at once


class _ForLibsndfile:
    """A file object that libsndfile may call: a damaged file makes it seek to places that are none.

    An exception would be lost in the library, which prints it; an unwanted position it understands.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        # Not `read`: what it returns may be longer than the library's buffer.
        self.readinto, self.tell = getattr(file, "readinto"), file.tell  # noqa: B009, no BinaryIO has it

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (ValueError, OSError, OverflowError):
            return self._file.tell()


def _openable(file: str | os.PathLike | BinaryIO) -> Any:
    return file if isinstance(file, str | os.PathLike) else _ForLibsndfile(file)


class Recording(NamedTuple):
    """A decoded file: float32 `samples` `[t]` at 16 kHz in [-1, 1], its channels and rate (Hz)."""

    samples: np.ndarray
    channels: int
    rate: int


def read_audio(
    file: str | os.PathLike | BinaryIO,
    name: str | None = None,
    most_seconds: float = MOST_SECONDS,
) -> Recording:
    """Decode WAV, FLAC, Ogg (Vorbis, Opus) or MP3 to 16 kHz mono.

    Several channels become their mean; another rate is resampled by soxr at its high quality;
    samples are then clipped to [-1, 1].

    Args:
        file: a path, or a binary file object.
        name: what error messages call it; the path, when not given.
        most_seconds: a longer file is refused, and no more of it than this is decoded.

    Raises:
        InputError: naming the file: unreadable, truncated, zero length, too long, a sample rate
            that is none of audio, NaN or infinite samples, amplitude far outside [-1, 1].
    """
    name = name or (
        str(file) if isinstance(file, str | os.PathLike) else getattr(file, "name", "audio")
    )
    blocks, length = [], 0
    try:
        with soundfile.SoundFile(_openable(file)) as sound:
            rate, channels, promised = sound.samplerate, sound.channels, sound.frames
            require_rate(str(name), rate)
            # Not read(-1): a FLAC stream of unknown length claims 2**63 - 1 frames.
            size = max(1, _BLOCK // channels)
            while len(block := sound.read(size, dtype="float32", always_2d=True)):
                length += len(block)
                if length > most_seconds * rate:
                    raise InputError(
                        f"{name}: longer than {most_seconds:g} s, the most that is read at once; "
                        "the fix: cut it into pieces"
                    )
                with np.errstate(over="ignore"):  # infinite samples are named below
                    blocks.append(block[:, 0] if channels == 1 else block.mean(axis=1))
            container = sound.format
    except InputError:
        raise
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{name}: unreadable audio ({error}); "
            "the fix: replace the file with valid WAV, FLAC, Ogg or MP3"
        ) from error
    if not blocks:
        raise InputError(f"{name}: zero-length audio; the fix: replace or remove the file")
    samples = np.concatenate(blocks)
    if container == "FLAC" and promised < 2**62 and len(samples) < promised:
        raise InputError(
            f"{name}: truncated: {len(samples)} of {promised} samples are there; "
            "the fix: fetch the file again"
        )
    if not np.isfinite(samples).all():
        bad = int(np.count_nonzero(~np.isfinite(samples)))
        raise InputError(
            f"{name}: {bad} NaN or infinite samples; the fix: replace or remove the file"
        )
    peak = float(np.abs(samples).max())
    if peak > MAX_AMPLITUDE:
        raise InputError(
            f"{name}: amplitude reaches {peak:g}, the limit is 1; "
            "the fix: scale the samples to [-1, 1]"
        )
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
        if not len(samples):
            raise InputError(
                f"{name}: zero-length audio at 16 kHz; the fix: replace or remove the file"
            )
    return Recording(np.clip(samples, -1.0, 1.0, dtype=np.float32), channels, rate)


def require_rate(name: str | os.PathLike, rate: int) -> None:
    """Refuses a sample rate (Hz) outside `RATES`, by an InputError that names the file."""
    if not RATES[0] <= rate <= RATES[1]:
        raise InputError(
            f"{name}: the header says {rate} Hz; audio has {RATES[0]} to {RATES[1]}; "
            "the fix: replace the file"
        )


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Round float samples in [-1, 1] to int16, 1.0 being 32768 (clipped to 32767)."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)


def read_int16(file: str | os.PathLike | BinaryIO, name: str | None = None) -> np.ndarray:
    """`to_int16(read_audio(file, name).samples)`; 16-bit mono audio at 16 kHz comes without the way through floats.

    Raises:
        InputError: as `read_audio`.
    """
    try:
        with soundfile.SoundFile(_openable(file)) as sound:
            kind = (sound.samplerate, sound.channels, sound.subtype)
            # A stream of unknown length claims 2**63 - 1 frames.
            if kind == (SAMPLE_RATE, 1, "PCM_16") and sound.frames <= MOST_SECONDS * SAMPLE_RATE:
                samples = sound.read(dtype="int16")
                if len(samples) == sound.frames > 0:
                    return samples
    except (soundfile.SoundFileError, OSError, TypeError, ValueError):
        pass  # `read_audio` says what is wrong
    if not isinstance(file, str | os.PathLike):
        file.seek(0)
    return to_int16(read_audio(file, name).samples)


def from_int16(samples: np.ndarray) -> np.ndarray:
    """int16 samples as float32 in [-1, 1); `to_int16` gives the same integers back."""
    return samples.astype(np.float32) / np.float32(32768)


@functools.lru_cache
def _ratio(factor: float) -> Fraction:
    return Fraction(factor).limit_denominator(1000)


def speed_length(num_samples, factor: float):
    """Samples left after a change of speed: ceil(num_samples / factor), int or int array as given.

    The factor is taken as the nearest fraction with a denominator up to 1000, so that 1.1 means
    11/10 and the division is exact.
    """
    ratio = _ratio(factor)
    return -(-num_samples * ratio.denominator // ratio.numerator)


def change_speed(samples: np.ndarray, factor: float) -> np.ndarray:
    """Play audio `factor` times as fast, tempo and pitch together, by resampling (Ko et al. 2015).

    Args:
        samples: float32 `[t]`, 16 kHz.
        factor: above 1 is faster and shorter.

    Returns:
        float32 `[ceil(t / factor)]` in [-1, 1]; the samples themselves when the factor is 1.
    """
    if factor == 1.0:
        return samples
    length = speed_length(len(samples), factor)
    changed = soxr.resample(samples, SAMPLE_RATE * float(_ratio(factor)), SAMPLE_RATE, quality="HQ")
    # soxr rounds the length to the nearest sample: at most one sample is missing, or one too many.
    changed = np.pad(changed[:length], (0, max(0, length - len(changed))))
    return np.clip(changed, -1.0, 1.0, dtype=np.float32)
