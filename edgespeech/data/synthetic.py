"""Synthetic speech for tests and a first training run: espeak-ng reads a small grammar.

It is synthetic, and results on it say nothing about real speech. The voices are formant synthesis,
clean and regular.
"""

import ctypes
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr

from edgespeech.data.audio import SAMPLE_RATE, from_int16, to_int16
from edgespeech.data.corpus import (
    MALFORMED_NPZ,
    Corpus,
    Utterance,
    cache_folder,
    write_atomically,
)
from edgespeech.data.phrases import sentences
from edgespeech.errors import InputError

SPLITS = ("train", "dev", "test")
ACCENTS = (*("en-us", "en-us-nyc", "en-gb-x-rp", "en-gb-scotland"),)
# espeak-ng's variants that sound like a person. Left out: whispers, croaks, robots, echoes, Klatt
# synthesis, and every variant with breath noise, which espeak-ng seeds from the clock. Variants
# made from one another share a split.
_VARIANTS = {
    "train": "m1 m3 m5 m7 m8 f1 Alex Annie Denis Gene Gene2 Lee Mario Michael Mike Nguyen aunty "
    "belinda boris ed john kaukovalta linda marcelo michel rob robert shelby",
    "dev": "m2 m6 grandma",
    "test": "m4 f4 max paul",
}
VARIANTS = {split: tuple(names.split()) for split, names in _VARIANTS.items()}
_GENERATOR = 3  # raise it when the audio of a configuration changes
# espeak-ng carries state from one utterance to the next: what one process speaks is part of what the audio is.
_JOBS_PER_PROCESS = 1200


@dataclass(frozen=True)
class SyntheticConfig:
    """Size and seed of the synthetic corpus.

    Attributes:
        num_train: utterances to train on.
        num_dev: utterances for development.
        num_test: utterances to test on.
        seed: of sentences, voices and their variation.
    """

    num_train: int = 14400
    num_dev: int = 100
    num_test: int = 200
    seed: int = 0

    def __post_init__(self):
        for name in ("num_train", "num_dev", "num_test"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; the fix: 1 or more")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; the fix: 0 or above")


class Job(NamedTuple):
    """What espeak-ng is told: pitch and its range 0 to 100 (50 is normal), words a minute."""

    text: str
    voice: str
    pitch: int
    pitch_range: int
    rate: int


class SyntheticCorpus(Corpus):
    """One split ("train", "dev" or "test") of the synthetic corpus.

    No two splits share a voice or a sentence. Each utterance varies a little in pitch, rate, level
    and noise. The same arguments give the same samples, byte for byte, with the same espeak-ng; the
    test split depends on num_test and seed alone, so results stay comparable when the training set
    grows.

    Args:
        split: "train", "dev" or "test".
        config: see `SyntheticConfig`.
        cache_dir: where the audio is kept (32 kB a second); see `corpus.cache_folder`.

    Raises:
        InputError: an unknown split, more sentences than the grammar gives, or espeak-ng missing or
            failing.
    """

    kind = "synthetic"

    def __init__(
        self,
        split: str,
        config: SyntheticConfig = SyntheticConfig(),
        cache_dir: str | os.PathLike | None = None,
    ):
        if split not in SPLITS:
            raise InputError(
                f"the synthetic corpus has no split {split!r}; the fix: one of {', '.join(SPLITS)}"
            )
        self.name = f"synthetic-{split}"
        jobs = plan(split, config)
        description = [asdict(config), split, jobs, _GENERATOR, _versions(), soxr.__version__]
        key = hashlib.sha256(json.dumps(description).encode()).hexdigest()[:16]
        path = cache_folder(cache_dir, "synthetic") / f"{split}-{key}.npz"
        notes = []
        try:
            self._samples, lengths = _load(path, len(jobs))
        except MALFORMED_NPZ as error:
            if not isinstance(error, FileNotFoundError):
                notes.append(f"the cached audio was damaged ({error}): it was made again")
            audio = _render(split, config.seed, jobs)
            lengths = np.asarray([len(samples) for samples in audio])
            self._samples = np.concatenate(audio)
            try:
                write_atomically(
                    path, lambda file: np.savez(file, samples=self._samples, lengths=lengths)
                )
            except OSError as failure:
                notes.append(
                    f"the audio could not be kept ({failure}): the next opening makes it again"
                )
        self._ends = np.cumsum(lengths)
        self.notes = tuple(notes)
        self.utterances = tuple(
            Utterance(f"{self.name}-{index:05d}", job.voice, job.text, int(length))
            for index, (job, length) in enumerate(zip(jobs, lengths, strict=True))
        )

    def audio(self, index: int) -> np.ndarray:
        """Samples of one utterance: float32 `[t]` in [-1, 1) at 16 kHz."""
        end = int(self._ends[index])
        return from_int16(self._samples[end - self.utterances[index].num_samples : end])


def plan(split: str, config: SyntheticConfig) -> list[Job]:
    """What is said, by whom and how, in one split: splits share no sentence and no voice."""
    texts: dict[str, list[str]] = {}
    for name in ("test", "dev", "train"):
        taken = {text for others in texts.values() for text in others}
        count = getattr(config, f"num_{name}")
        # To train on, a sentence may come again: another voice says it.
        texts[name] = sentences(
            count, (config.seed, SPLITS.index(name)), exclude=taken, repeat=name == "train"
        )
    everyone = [variant for name in SPLITS for variant in VARIANTS[name]]
    assert len(set(everyone)) == len(everyone), "a variant stands in two splits"
    voices = [f"{accent}+{variant}" for variant in VARIANTS[split] for accent in ACCENTS]
    speakers = _random(config.seed, split, 1).random((len(voices), 2))
    draws = _random(config.seed, split, 2).random((len(texts[split]), 4))
    jobs = []
    for text, (who, pitch, pitch_range, rate) in zip(texts[split], draws, strict=True):
        speaker = int(who * len(voices))
        jobs.append(
            Job(
                text=text,
                voice=voices[speaker],
                pitch=round(35 + 30 * speakers[speaker, 0] + 10 * (pitch - 0.5)),
                pitch_range=round(35 + 30 * pitch_range),
                rate=round(150 + 40 * speakers[speaker, 1] + 20 * (rate - 0.5)),
            )
        )
    return jobs


def _random(seed: int, split: str, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, SPLITS.index(split), *stream]))


def _load(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        samples, lengths = file["samples"], file["lengths"]
    if samples.dtype != np.int16 or len(lengths) != count or lengths.sum() != len(samples):
        raise ValueError("lengths and samples disagree")
    return samples, lengths


def _render(split: str, seed: int, jobs: Sequence[Job]) -> list[np.ndarray]:
    """int16 audio at 16 kHz: margins of 0.1 to 0.25 s, a level, noise 30 to 40 dB below."""
    starts = range(0, len(jobs), _JOBS_PER_PROCESS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(
            lambda start: _render_part(split, seed, jobs[start : start + _JOBS_PER_PROCESS], start),
            starts,
        )
        return [samples for part in parts for samples in part]


def _render_part(split: str, seed: int, jobs: Sequence[Job], first: int) -> list[np.ndarray]:
    """`_render` of consecutive jobs, the first of which is number `first` of the split."""
    result = []
    rate, spoken = _synthesise(jobs)
    for index, raw in enumerate(spoken, first):
        random = _random(seed, split, 3, index)
        speech = soxr.resample(from_int16(raw), rate, SAMPLE_RATE, quality="HQ")
        loud = np.flatnonzero(np.abs(speech) > 0.01 * np.abs(speech).max())
        before, after, level, snr = random.random(4)
        margins = [int(SAMPLE_RATE * (0.1 + 0.15 * margin)) for margin in (before, after)]
        speech = np.pad(speech[loud[0] : loud[-1] + 1], margins)
        speech *= 10 ** (-(2 + 10 * level) / 20) / np.abs(speech).max()  # peak at -2 to -12 dB
        noise = random.standard_normal(len(speech), dtype=np.float32)
        noise *= np.sqrt(np.mean(speech**2)) * 10 ** (-(30 + 10 * snr) / 20)
        result.append(to_int16(speech + noise))
    return result


def _synthesise(jobs: Sequence[Job]) -> tuple[int, list[np.ndarray]]:
    """Speak the jobs in a process of their own: the rate (Hz) and the int16 samples of each.

    The library keeps state from one utterance to the next (pitch flutter) that nothing resets, so
    only a fresh process gives the same bytes each time.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    script = "from edgespeech.data import synthetic; synthetic._speak()"
    child = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(jobs).encode(),
        capture_output=True,
        env=environment,
        check=False,
    )
    if child.returncode:
        reason = child.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise InputError(
            f"espeak-ng failed with status {child.returncode}: {reason[0]}; "
            "the fix: install espeakng_loader again"
        )
    with np.load(io.BytesIO(child.stdout), allow_pickle=False) as file:
        rate, samples, lengths = int(file["rate"]), file["samples"], file["lengths"]
    return rate, np.split(samples, np.cumsum(lengths)[:-1])


def _speak() -> None:
    """The process that `_synthesise` starts: jobs as JSON on stdin, an .npz on stdout."""
    jobs = [Job(*job) for job in json.load(sys.stdin)]
    library = _library()
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, _data_path(), 0)
    if rate <= 0:
        raise RuntimeError(f"espeak_Initialize returned {rate}")
    chunks: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, count, _events):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(collect)
    audio = []
    for job in jobs:
        chunks.clear()
        variant = os.path.join(os.fsdecode(_data_path()), "voices", "!v", job.voice.split("+")[1])
        # espeak-ng takes an unknown variant for none and says nothing.
        if not os.path.exists(variant) or library.espeak_SetVoiceByName(job.voice.encode()):
            raise RuntimeError(f"voice {job.voice!r} is not in the data of espeak-ng")
        settings = {_RATE: job.rate, _VOLUME: 50, _PITCH: job.pitch, _RANGE: job.pitch_range}
        for parameter, value in settings.items():
            library.espeak_SetParameter(parameter, value, 0)
        text = job.text.lower().encode() + b"\0"
        if library.espeak_Synth(text, len(text), 0, 1, 0, _UTF8, None, None) or not chunks:
            raise RuntimeError(f"no audio for {job.text!r} in voice {job.voice!r}")
        audio.append(np.concatenate(chunks))
    result = io.BytesIO()
    np.savez(result, rate=rate, samples=np.concatenate(audio), lengths=[len(a) for a in audio])
    sys.stdout.buffer.write(result.getvalue())


# Constants of espeak-ng's speak_lib.h.
_SYNCHRONOUS = 2
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_UTF8 = 1


def _loader():
    try:
        import espeakng_loader
    except ImportError as error:
        raise InputError(
            "the synthetic corpus needs espeak-ng; the fix: pip install espeakng_loader"
        ) from error
    return espeakng_loader


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(_loader().get_library_path())
    library.espeak_Info.restype = ctypes.c_char_p
    return library


def _data_path() -> bytes:
    return os.fsencode(_loader().get_data_path())


def _versions() -> list[str]:
    """Of espeak-ng, and of the wheel that brings its data."""
    return [_library().espeak_Info(None).decode(), version("espeakng_loader")]
