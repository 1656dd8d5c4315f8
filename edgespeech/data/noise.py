"""Noise for mixtures: any folder of noise, or generated noise; and rooms."""

import os
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile

from edgespeech.data.audio import SAMPLE_RATE, read_audio
from edgespeech.data.corpus import Corpus, Skipped
from edgespeech.data.folder import EXTENSIONS
from edgespeech.errors import InputError

NOISE_KINDS = ("coloured", "babble", "hum", "clicks")
SILENT_SPEECH = 1e-6  # mean square, -60 dB: a quieter voice counts as one of this level


class NoiseSource(Protocol):
    """Where noise comes from."""

    def clip(
        self, random: np.random.Generator, num_samples: int, speakers: Sequence[str]
    ) -> np.ndarray:
        """float32 `[num_samples]` at 16 kHz, any level; `speakers` are those it must not let speak."""
        ...


class FolderNoise:
    """A random stretch of a random file below a folder; shorter files go round.

    Args:
        folder: searched at any depth for WAV, FLAC, Opus, Ogg and MP3, at any rate and channel count.

    Attributes:
        paths: the files, in the order of their names.
        skipped: files whose header cannot be read.

    Raises:
        InputError: no readable audio file in the folder.
    """

    def __init__(self, folder: str | os.PathLike):
        found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in EXTENSIONS)
        paths, skipped = [], []
        for path in found:
            try:
                empty = not soundfile.info(path).frames
                fault = "zero-length audio" if empty else ""
            except (soundfile.SoundFileError, OSError) as error:
                fault = f"unreadable audio ({error})"
            if fault:
                skipped.append(Skipped(str(path.relative_to(folder)), fault))
            else:
                paths.append(path)
        if not paths:
            raise InputError(
                f"{folder} has no readable noise ({len(skipped)} of {len(found)} audio files skipped); "
                f"the fix: a folder with {', '.join(EXTENSIONS)}"
            )
        self.paths = tuple(paths)
        self.skipped = tuple(skipped)

    def hold_out(self, every: int = 5) -> tuple["FolderNoise", "FolderNoise"]:
        """The source without every fifth file, and one of those files: noise to train on, and noise to test with.

        Raises:
            InputError: fewer files than `every`.
        """
        if len(self.paths) < every:
            raise InputError(
                f"{len(self.paths)} files of noise: to hold out one in {every} takes at least {every}; "
                "the fix: a larger folder"
            )
        kept, held_out = copy(self), copy(self)
        held_out.paths = self.paths[every - 1 :: every]
        kept.paths = tuple(path for path in self.paths if path not in held_out.paths)
        return kept, held_out

    def clip(
        self, random: np.random.Generator, num_samples: int, speakers: Sequence[str]
    ) -> np.ndarray:
        """See `NoiseSource`; a file is decoded at each call."""
        del speakers
        path = self.paths[draw(random, len(self.paths))]
        return _stretch(random, read_audio(path).samples, num_samples)


class GeneratedNoise:
    """Noise that needs no files: coloured, babble of a corpus's voices, mains hum, clicks (ours).

    Args:
        corpus: whose utterances make the babble.
        kinds: some of `NOISE_KINDS`, each as likely as the others.

    Raises:
        InputError: an unknown kind, or none.
    """

    def __init__(self, corpus: Corpus, kinds: Sequence[str] = NOISE_KINDS):
        unknown = [kind for kind in kinds if kind not in NOISE_KINDS]
        if unknown or not kinds:
            raise InputError(
                f"noise kinds are {', '.join(kinds) or 'empty'}; the fix: some of {', '.join(NOISE_KINDS)}"
            )
        self.kinds = tuple(kinds)
        self._corpus = corpus

    def clip(
        self, random: np.random.Generator, num_samples: int, speakers: Sequence[str]
    ) -> np.ndarray:
        """See `NoiseSource`."""
        kind = self.kinds[draw(random, len(self.kinds))]
        if kind == "coloured":
            return coloured(random, num_samples, random.uniform(-0.5, 2.0))
        if kind == "babble":
            return babble(random, num_samples, self._corpus, speakers)
        return (hum if kind == "hum" else clicks)(random, num_samples)


def coloured(random: np.random.Generator, num_samples: int, exponent: float) -> np.ndarray:
    """Gaussian noise whose power falls as `1 / f^exponent`: 0 is white, 1 pink, 2 brown; float32 `[num_samples]`."""
    size = max(num_samples, 64)
    spectrum = np.fft.rfft(random.standard_normal(size))
    gain = np.zeros(len(spectrum))  # and none at 0 Hz
    gain[1:] = np.arange(1, len(spectrum)) ** (-exponent / 2)
    noise = np.fft.irfft(spectrum * gain, size)[:num_samples]
    return (noise / np.sqrt(np.mean(noise**2))).astype(np.float32)


def babble(
    random: np.random.Generator, num_samples: int, corpus: Corpus, speakers: Sequence[str]
) -> np.ndarray:
    """Three to six utterances at once, at equal power, float32 `[num_samples]`.

    None is of the given speakers, unless the corpus has no others.
    """
    rows = [i for i, u in enumerate(corpus.utterances) if u.speaker not in speakers]
    rows = rows or list(range(len(corpus)))
    total = np.zeros(num_samples, np.float32)
    for _ in range(3 + draw(random, 4)):
        voice = _stretch(random, corpus.audio(rows[draw(random, len(rows))]), num_samples)
        total += voice / np.sqrt(max(power(voice), SILENT_SPEECH))
    return total


def hum(random: np.random.Generator, num_samples: int) -> np.ndarray:
    """Mains hum at 50 or 60 Hz with 19 harmonics that fall roughly as 1/h, float32 `[num_samples]`."""
    time = np.arange(num_samples) / SAMPLE_RATE
    base = (50.0, 60.0)[draw(random, 2)] * (1 + 0.002 * random.uniform(-1, 1))
    harmonics = np.arange(1, 21)
    levels = random.uniform(0.2, 1.0, 20) / harmonics
    phases = random.uniform(0, 2 * np.pi, 20)
    waves = np.sin(2 * np.pi * base * harmonics[:, None] * time + phases[:, None])
    return (levels @ waves).astype(np.float32)


def clicks(random: np.random.Generator, num_samples: int) -> np.ndarray:
    """Two to twenty clicks a second, at least one: bursts that decay by 1/e in 0.3 to 3 ms, float32 `[num_samples]`."""
    noise = np.zeros(num_samples)
    rate = random.uniform(2, 20)
    for _ in range(max(1, round(rate * num_samples / SAMPLE_RATE))):
        start, decay = draw(random, num_samples), SAMPLE_RATE * random.uniform(0.0003, 0.003)
        burst = random.standard_normal(round(5 * decay)) * np.exp(
            -np.arange(round(5 * decay)) / decay
        )
        burst *= 10 ** (random.uniform(-10, 10) / 20)
        noise[start : start + len(burst)] += burst[: num_samples - start]
    return noise.astype(np.float32)


def room_response(random: np.random.Generator, rt60: float, direct_db: float) -> np.ndarray:
    """Impulse response of a room: the direct sound at sample 0, then a tail of decaying Gaussian noise.

        h_0 = 1,   h_i = a g_i 10^(-3 i / (rt60 rate))  for i from 2 ms on

    (the statistical model of Polack, 1988); a sets the ratio of direct to reverberant energy.

    Args:
        random: of the tail.
        rt60: seconds in which the tail falls by 60 dB.
        direct_db: direct-to-reverberant ratio, dB.

    Returns:
        float64 `[rt60 * 16000]`.
    """
    response = random.standard_normal(round(rt60 * SAMPLE_RATE))
    response *= 10.0 ** (-3.0 * np.arange(len(response)) / (rt60 * SAMPLE_RATE))
    response[: round(0.002 * SAMPLE_RATE)] = 0.0
    response *= 10 ** (-direct_db / 20) / np.sqrt(np.sum(response**2))
    response[0] = 1.0
    return response


def reverberate(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolution with a room's response, cut to the length of the samples; float32 `[t]`."""
    size = len(samples) + len(response) - 1
    product = np.fft.rfft(samples, size) * np.fft.rfft(response, size)
    return np.fft.irfft(product, size)[: len(samples)].astype(np.float32)


def draw(random: np.random.Generator, count: int) -> int:
    """One of 0 to count - 1, by `random()` alone, whose stream no version of NumPy changes."""
    return int(random.random() * count)


def power(samples: np.ndarray) -> float:
    """Mean square, summed in float64."""
    return float(np.mean(np.square(samples, dtype=np.float64)))


def _stretch(random: np.random.Generator, samples: np.ndarray, num_samples: int) -> np.ndarray:
    """`num_samples` of the samples from a random place on, round and round when they are too few."""
    if len(samples) > num_samples:
        start = draw(random, len(samples) - num_samples + 1)
        return samples[start : start + num_samples]
    return np.resize(np.roll(samples, -draw(random, len(samples))), num_samples)
