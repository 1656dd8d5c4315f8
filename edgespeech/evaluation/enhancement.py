"""Scores of enhanced speech: SI-SNR improvement, PESQ and STOI, all of them of audio files.

What is scored is what can be listened to: estimates are written as 16-bit WAV first and read back.
PESQ (ITU-T P.862.2, wide band) and STOI (Taal et al., 2011) need the packages `pesq` and `pystoi`.
"""

import importlib
import importlib.util
import json
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np
import soundfile
from flax import nnx

from edgespeech.data.audio import SAMPLE_RATE, read_audio, to_int16
from edgespeech.data.corpus import write_atomically
from edgespeech.data.mixtures import MixtureBatch, MixtureSource
from edgespeech.evaluation.wer import bootstrap_interval
from edgespeech.ops.sisnr import si_snr_reference

OPTIONAL = {"pesq": "pesq", "stoi": "pystoi"}  # metric: the package that it needs
_STOI_SAMPLES = 8192  # a shorter signal has fewer than the 30 frames that STOI compares

# batch -> estimates `[b spk t]`
Enhance = Callable[[MixtureBatch], np.ndarray]


class UtteranceScores(NamedTuple):
    """Scores of one estimate.

    Attributes:
        id: of the utterance.
        si_snr: SI-SNR to the clean voice, dB.
        improvement: `si_snr` less that of the noisy audio, dB.
        pesq: mean opinion score, about 1 to 4.6; NaN without its package, or where it finds no speech.
        stoi: intelligibility, at most 1; NaN without its package, or for less than half a second.
    """

    id: str
    si_snr: float
    improvement: float
    pesq: float
    stoi: float


def missing_packages() -> list[str]:
    """The packages of `OPTIONAL` that are not installed."""
    return [name for name in OPTIONAL.values() if importlib.util.find_spec(name) is None]


def score_utterance(
    utterance: str, noisy: np.ndarray, clean: np.ndarray, estimate: np.ndarray
) -> UtteranceScores:
    """All scores of an estimate, float `[t]` at 16 kHz like the others."""
    value = si_snr_reference(estimate, clean)
    before = si_snr_reference(noisy, clean)
    return UtteranceScores(
        utterance, value, value - before, _pesq(clean, estimate), _stoi(clean, estimate)
    )


def _pesq(clean: np.ndarray, estimate: np.ndarray) -> float:
    if OPTIONAL["pesq"] in missing_packages():
        return math.nan
    package = importlib.import_module("pesq")
    codes = package.PesqError.RETURN_VALUES
    value = package.pesq(SAMPLE_RATE, clean, estimate, "wb", on_error=codes)
    return float(value) if value >= 0 else math.nan  # negative: an error code


def _stoi(clean: np.ndarray, estimate: np.ndarray) -> float:
    if OPTIONAL["stoi"] in missing_packages() or len(clean) < _STOI_SAMPLES:
        return math.nan
    stoi = importlib.import_module("pystoi").stoi
    with warnings.catch_warnings():
        # Too few frames that are not silent: 1e-5 comes back with a warning.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(stoi(clean, estimate, SAMPLE_RATE))
        except RuntimeWarning:
            return math.nan


def enhancer(graphdef: nnx.GraphDef) -> Callable[[nnx.State, MixtureBatch], np.ndarray]:
    """`(state, batch) -> estimates [b spk t]` of SepFormers of one structure, compiled for each batch shape."""

    @jax.jit
    def run(state: nnx.State, audio: Any, lengths: Any):
        return nnx.merge(graphdef, state)(audio, lengths).estimates

    return lambda state, batch: np.asarray(run(state, batch.audio, batch.audio_lengths))


def level(noisy: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """The estimate with the gain that fits it best to the noisy audio, less where it would leave [-1, 1].

        estimate <noisy, estimate> / <estimate, estimate>

    as `inference.enhance` does (ours): SI-SNR as a loss leaves the level of an estimate free.
    """
    heard, made = np.asarray(noisy, np.float64), np.asarray(estimate, np.float64)
    gain = heard @ made / max(made @ made, 1e-20)
    return made * (gain / max(1.0, abs(gain) * np.abs(made).max()))


def write_mixtures(folder: Path, source: MixtureSource) -> None:
    """Writes what a source mixes as `noisy/ROW.wav` and the voice in it as `clean/ROW.wav`, once."""
    done = folder / "mixtures.json"
    if done.exists():
        return
    rows = {}
    for batch in source.eval_batches():
        for row, noisy, clean in _rows(batch):
            _write(folder / "noisy" / f"{row:04d}.wav", noisy)
            _write(folder / "clean" / f"{row:04d}.wav", clean[0])
            rows[f"{row:04d}"] = source.corpus.utterances[row].id
    text = json.dumps(rows, indent=2, sort_keys=True) + "\n"
    write_atomically(done, lambda file: file.write(text.encode()))


def write_estimates(folder: Path, name: str, enhance: Enhance, source: MixtureSource) -> None:
    """Writes the estimate of every utterance of a source as `NAME/ROW.wav`, at the level of the voice."""
    for batch in source.eval_batches():
        estimates = enhance(batch)
        rows = _rows(batch._replace(targets=estimates))
        for row, noisy, estimate in rows:
            _write(folder / name / f"{row:04d}.wav", level(noisy, estimate[0]))


def _rows(batch: MixtureBatch):
    """Corpus row, noisy `[t]` and targets `[spk t]` of every utterance in a batch."""
    for i in np.flatnonzero(batch.index >= 0):
        length = batch.audio_lengths[i]
        yield int(batch.index[i]), batch.audio[i, :length], batch.targets[i, :, :length]


def _write(path: Path, samples: np.ndarray) -> None:
    def write(file: BinaryIO) -> None:
        soundfile.write(file, to_int16(samples), SAMPLE_RATE, format="WAV")

    write_atomically(path, write)


def score_files(folder: Path, name: str) -> tuple[UtteranceScores, ...]:
    """Scores of the files in `NAME` with those in `noisy` and `clean`, in the order of their rows."""
    rows = json.loads((folder / "mixtures.json").read_text())

    def read(kind: str, row: str) -> np.ndarray:
        return read_audio(folder / kind / f"{row}.wav").samples

    return tuple(
        score_utterance(rows[row], read("noisy", row), read("clean", row), read(name, row))
        for row in sorted(rows)
    )


def evaluate(
    workdir: Path, name: str, enhance: Enhance | None, source: MixtureSource
) -> tuple[UtteranceScores, ...]:
    """Scores of a system on every utterance of a source.

    The audio stays in `audio/NAME` and the scores in `scores/NAME.jsonl`, from which a resumed run reads them.

    Args:
        workdir: of the run.
        name: of the system; with "noisy" it is the audio as it came, and nothing enhances it.
        enhance: the system.
        source: the mixtures.
    """
    path, audio = workdir / "scores" / f"{name}.jsonl", workdir / "audio"
    if path.exists():
        lines = path.read_text().splitlines()
        rows = (json.loads(line, parse_constant=float) for line in lines)
        return tuple(UtteranceScores(**row) for row in rows)
    write_mixtures(audio, source)
    if enhance is not None:
        write_estimates(audio, name, enhance, source)
    scores = score_files(audio, name)
    text = "".join(json.dumps(row._asdict()) + "\n" for row in scores)
    write_atomically(path, partial(_put, text))
    return scores


def _put(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def summary(
    scores: Sequence[UtteranceScores], teacher: Sequence[UtteranceScores] | None = None
) -> dict[str, Any]:
    """Means over utterances, the improvement's with a 95 % interval; NaN where no utterance has a score.

    Args:
        scores: of a system.
        teacher: scores of the same utterances; with it comes the mean of the differences, too.
    """
    improvements = np.asarray([row.improvement for row in scores])
    means = {
        "si_snr": float(np.mean([row.si_snr for row in scores])),
        "improvement": float(improvements.mean()),
        "ci": list(mean_interval(improvements)),
        "pesq": _mean([row.pesq for row in scores]),
        "stoi": _mean([row.stoi for row in scores]),
    }
    if teacher is not None:
        differences = improvements - [row.improvement for row in teacher]
        means["delta_vs_teacher"] = {
            "difference": float(differences.mean()),
            "ci": list(mean_interval(differences)),
        }
    return means


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean, by the bootstrap over utterances that WER has."""
    return bootstrap_interval(values, np.ones(len(values)))


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan
