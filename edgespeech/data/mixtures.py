"""Noisy speech made on the fly: any corpus with any source of noise.

A mixture is a function of (seed, epoch, row): nothing needs to be stored, and an evaluation meets the same noise again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from edgespeech.data.audio import SAMPLE_RATE
from edgespeech.data.batching import Batch, BatchConfig, BatchSource
from edgespeech.data.corpus import Corpus, Utterance
from edgespeech.data.noise import (
    SILENT_SPEECH,
    NoiseSource,
    draw,
    power,
    reverberate,
    room_response,
)
from edgespeech.errors import InputError

_SILENT_NOISE = 1e-10  # mean square, -100 dB: such noise is drawn anew
_DRAWS = 8


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

        snr_db = config.snr_db[draw(random, len(config.snr_db))]
        noise = self._audible_noise(random, len(speech), speakers)
        ratio = max(power(clean), SILENT_SPEECH) / power(noise)
        noisy = clean + np.float32(np.sqrt(ratio) * 10 ** (-snr_db / 20)) * noise
        scale = np.float32(1 / max(1.0, np.abs(noisy).max(), np.abs(targets).max()))
        return Mixture(noisy * scale, targets * scale, snr_db)

    def _second_voice(
        self, random: np.random.Generator, speech: np.ndarray, speaker: str
    ) -> tuple[np.ndarray, str]:
        utterances = self.corpus.utterances
        rows = [i for i, u in enumerate(utterances) if u.speaker != speaker]
        row = (rows or range(len(utterances)))[draw(random, len(rows or utterances))]
        voice = self.corpus.audio(row)
        start = draw(random, max(1, len(voice) - len(speech) + 1))
        voice = voice[start : start + len(speech)]
        voice = np.pad(voice, (0, len(speech) - len(voice)))
        gain = np.sqrt(power(speech) / max(power(voice), SILENT_SPEECH))
        gain *= 10 ** (random.uniform(-2.5, 2.5) / 20)
        return voice * np.float32(gain), utterances[row].speaker

    def _audible_noise(
        self, random: np.random.Generator, num_samples: int, speakers: Sequence[str]
    ) -> np.ndarray:
        for _ in range(_DRAWS):
            noise = self._noise.clip(random, num_samples, speakers)
            if power(noise) > _SILENT_NOISE:
                return noise
        raise InputError(
            f"{_DRAWS} draws of noise were all silent; the fix: remove silent files from the folder of noise"
        )
