"""Noisy speech made on the fly: any corpus with any folder of noise, or with generated noise.

A mixture is a function of (seed, epoch, row): nothing needs to be stored, and an evaluation meets the same noise again.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import soundfile

from edgespeech.data.audio import SAMPLE_RATE, read_audio
from edgespeech.data.batching import Batch, BatchConfig, BatchSource
from edgespeech.data.corpus import Corpus, Skipped, Utterance
from edgespeech.data.folder import EXTENSIONS
from edgespeech.errors import InputError

NOISE_KINDS = ("coloured", "babble", "hum", "clicks")
# Mean squares below which a signal is silence: -100 dB for noise, which is then drawn anew; a quieter utterance than
# -60 dB gets the noise of one at -60 dB.
_SILENT_NOISE, _SILENT_SPEECH = 1e-10, 1e-6
_DRAWS = 8


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

    def clip(
        self, random: np.random.Generator, num_samples: int, speakers: Sequence[str]
    ) -> np.ndarray:
        """See `NoiseSource`; a file is decoded at each call."""
        del speakers
        path = self.paths[_draw(random, len(self.paths))]
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
        kind = self.kinds[_draw(random, len(self.kinds))]
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
    for _ in range(3 + _draw(random, 4)):
        voice = _stretch(random, corpus.audio(rows[_draw(random, len(rows))]), num_samples)
        total += voice / np.sqrt(max(_power(voice), _SILENT_SPEECH))
    return total


def hum(random: np.random.Generator, num_samples: int) -> np.ndarray:
    """Mains hum at 50 or 60 Hz with 19 harmonics that fall roughly as 1/h, float32 `[num_samples]`."""
    time = np.arange(num_samples) / SAMPLE_RATE
    base = (50.0, 60.0)[_draw(random, 2)] * (1 + 0.002 * random.uniform(-1, 1))
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
        start, decay = _draw(random, num_samples), SAMPLE_RATE * random.uniform(0.0003, 0.003)
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


@dataclass(frozen=True)
class MixtureConfig:
    """How voices and noise are put together.

    Attributes:
        num_speakers: voices: 1, or 2 of different speakers (where there are) within 2.5 dB of each other.
        snr_db: ratios of speech to noise in dB; each mixture gets one of them.
        reverberation: probability that a mixture is in a room.
        rt60: shortest and longest reverberation time in seconds; the direct-to-reverberant ratio is 0 to 10 dB.
        dereverberate: the targets of a mixture in a room are the dry voices, instead of the reverberant ones.
        seed: of everything random.
    """

    num_speakers: int = 1
    snr_db: tuple[float, ...] = (-5.0, 0.0, 5.0, 10.0, 15.0)
    reverberation: float = 0.0
    rt60: tuple[float, float] = (0.2, 0.6)
    dereverberate: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.num_speakers not in (1, 2):
            raise InputError(f"num_speakers is {self.num_speakers}; the fix: 1 or 2")
        if not self.snr_db or not np.isfinite(self.snr_db).all():
            raise InputError(f"snr_db is {self.snr_db}; the fix: one or more finite ratios in dB")
        if not 0.0 <= self.reverberation <= 1.0:
            raise InputError(f"reverberation is {self.reverberation}; the fix: a probability")
        if not 0.05 <= self.rt60[0] <= self.rt60[1] <= 5.0:
            raise InputError(f"rt60 is {self.rt60}; the fix: two times in order, 0.05 to 5 s")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; the fix: 0 or above")


class Mixture(NamedTuple):
    """Speech with noise: `noisy` float32 `[t]` is the sum of the voices and the noise at `snr_db`.

    `targets` `[spk t]` are what a model is to return. All are in [-1, 1]: a sum above is scaled down with its targets.
    """

    noisy: np.ndarray
    targets: np.ndarray
    snr_db: float


class MixtureBatch(NamedTuple):
    """As `Batch`, with `audio` `[b t]` noisy and `targets` float32 `[b spk t]`, the voices; no text."""

    audio: Any
    audio_lengths: Any
    targets: Any
    weights: Any
    index: Any


class Excerpts(Corpus):
    """The utterances of a corpus in pieces of at most so many seconds, equal within an utterance, without texts."""

    def __init__(self, corpus: Corpus, seconds: float):
        if not seconds > 0:
            raise InputError(f"excerpts of {seconds} s; the fix: a number above 0")
        self.kind, self.name, self.notes = corpus.kind, corpus.name, corpus.notes
        self.skipped = corpus.skipped
        self._corpus = corpus
        self._places: list[tuple[int, int]] = []  # row of the corpus, first sample
        pieces = []
        for row, whole in enumerate(corpus.utterances):
            count = max(1, -(-whole.num_samples // max(1, int(seconds * SAMPLE_RATE))))
            cuts = [whole.num_samples * i // count for i in range(count + 1)]
            for number, (start, end) in enumerate(pairwise(cuts)):
                pieces.append(Utterance(f"{whole.id}.{number}", whole.speaker, "", end - start))
                self._places.append((row, start))
        self.utterances = tuple(pieces)

    def audio(self, index: int) -> np.ndarray:
        """Samples of one piece: float32 `[t]` in [-1, 1] at 16 kHz."""
        row, start = self._places[index]
        return self._corpus.audio(row)[start : start + self.utterances[index].num_samples]


class MixtureSource(BatchSource):
    """Batches of mixtures by step number; the plan, its buckets and its order are `BatchSource`'s.

    Args:
        corpus: the voices; cut long ones with `Excerpts`.
        noise: see `NoiseSource`.
        mixtures: see `MixtureConfig`.
        batches: see `BatchConfig`.

    Raises:
        InputError: as `BatchSource`; or, in a batch, noise that is silent eight times in a row.
    """

    def __init__(
        self, corpus: Corpus, noise: NoiseSource, mixtures: MixtureConfig, batches: BatchConfig
    ):
        super().__init__(corpus, None, batches)
        self._noise, self._mixtures = noise, mixtures

    def batch(self, step: int) -> MixtureBatch:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The batch of a step, counted from 0 over all epochs: a function of settings and step."""
        return self._add_noise(super().batch(step), self.locate(step)[0])

    def eval_batches(self) -> Iterator[MixtureBatch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Each kept utterance once, in length order, with the noise of epoch 0."""
        return (self._add_noise(clean, 0) for clean in super().eval_batches())

    def _add_noise(self, clean: Batch, epoch: int) -> MixtureBatch:
        height, width = clean.audio.shape
        noisy = np.zeros_like(clean.audio)
        targets = np.zeros((height, self._mixtures.num_speakers, width), np.float32)
        for row in np.flatnonzero(clean.index >= 0):
            length = clean.audio_lengths[row]
            mixture = self.mix(clean.audio[row, :length], int(clean.index[row]), epoch)
            noisy[row, :length], targets[row, :, :length] = mixture.noisy, mixture.targets
        return MixtureBatch(noisy, clean.audio_lengths, targets, clean.weights, clean.index)

    def mix(self, speech: np.ndarray, index: int, epoch: int) -> Mixture:
        """The mixture of an utterance: the same for the same (seed, epoch, index).

        Args:
            speech: float32 `[t]`, the audio of row `index`, perhaps at another speed.
            index: its row in the corpus.
            epoch: from 0.
        """
        config = self._mixtures
        random = np.random.Generator(np.random.PCG64([config.seed, epoch, index]))
        dry, speakers = [speech], [self.corpus.utterances[index].speaker]
        if config.num_speakers == 2:
            voice, speaker = self._second_voice(random, speech, speakers[0])
            dry.append(voice)
            speakers.append(speaker)
        wet = dry
        if random.random() < config.reverberation:
            rt60, direct_db = random.uniform(*config.rt60), random.uniform(0, 10)
            wet = [reverberate(voice, room_response(random, rt60, direct_db)) for voice in dry]
        clean = np.sum(wet, axis=0)
        targets = np.stack(dry if config.dereverberate else wet)

        snr_db = config.snr_db[_draw(random, len(config.snr_db))]
        noise = self._audible_noise(random, len(speech), speakers)
        ratio = max(_power(clean), _SILENT_SPEECH) / _power(noise)
        noisy = clean + np.float32(np.sqrt(ratio) * 10 ** (-snr_db / 20)) * noise
        scale = np.float32(1 / max(1.0, np.abs(noisy).max(), np.abs(targets).max()))
        return Mixture(noisy * scale, targets * scale, snr_db)

    def _second_voice(
        self, random: np.random.Generator, speech: np.ndarray, speaker: str
    ) -> tuple[np.ndarray, str]:
        utterances = self.corpus.utterances
        rows = [i for i, u in enumerate(utterances) if u.speaker != speaker]
        row = (rows or range(len(utterances)))[_draw(random, len(rows or utterances))]
        voice = self.corpus.audio(row)
        start = _draw(random, max(1, len(voice) - len(speech) + 1))
        voice = voice[start : start + len(speech)]
        voice = np.pad(voice, (0, len(speech) - len(voice)))
        gain = np.sqrt(_power(speech) / max(_power(voice), _SILENT_SPEECH))
        gain *= 10 ** (random.uniform(-2.5, 2.5) / 20)
        return voice * np.float32(gain), utterances[row].speaker

    def _audible_noise(
        self, random: np.random.Generator, num_samples: int, speakers: Sequence[str]
    ) -> np.ndarray:
        for _ in range(_DRAWS):
            noise = self._noise.clip(random, num_samples, speakers)
            if _power(noise) > _SILENT_NOISE:
                return noise
        raise InputError(
            f"{_DRAWS} draws of noise were all silent; the fix: remove silent files from the folder of noise"
        )


def _draw(random: np.random.Generator, count: int) -> int:
    """One of 0 to count - 1, by `random()` alone, whose stream no version of NumPy changes."""
    return int(random.random() * count)


def _power(samples: np.ndarray) -> float:
    return float(np.mean(np.square(samples, dtype=np.float64)))


def _stretch(random: np.random.Generator, samples: np.ndarray, num_samples: int) -> np.ndarray:
    """`num_samples` of the samples from a random place on, round and round when they are too few."""
    if len(samples) > num_samples:
        start = _draw(random, len(samples) - num_samples + 1)
        return samples[start : start + num_samples]
    return np.resize(np.roll(samples, -_draw(random, len(samples))), num_samples)
