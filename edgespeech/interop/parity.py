"""How far an exported file is from the model that it was made of."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from edgespeech.interop.ctc_model import CTCModel
from edgespeech.interop.exported import Exported, ctc_function
from edgespeech.interop.exported_exits import ExitsModel, read_exits_manifest, run_exits


class Difference(NamedTuple):
    """Between the logits of a file and of its model.

    Attributes:
        largest: largest absolute difference.
        relative: root mean square of the difference over that of the logits.
        labels: share of frames whose most likely token is another.
    """

    largest: float
    relative: float
    labels: float


def compare(model: CTCModel, exported: Exported, seed: int = 0) -> Difference:
    """Runs both on audio that fills the file's length and on audio that fills two thirds of it."""
    function = jax.jit(ctc_function(model))
    wanted, found = [], []
    for share in (1.0, 2 / 3):
        audio = speech_like(round(exported.samples * share), seed)
        found.append(exported.logits(audio))
        padded = np.pad(audio, (0, exported.samples - len(audio)))[None]
        logits, frames = function(padded, np.array([len(audio)], np.int32))
        wanted.append(np.asarray(logits)[0, : int(frames[0])])
    return difference(np.concatenate(wanted), np.concatenate(found))


def compare_exits(model: ExitsModel, folder: Path, seed: int = 0) -> list[Difference]:
    """The same of every exit of a model and its segments, on audio that fills two thirds of the files' length."""
    samples = read_exits_manifest(folder)["samples"]
    audio = speech_like(samples * 2 // 3, seed)
    length = np.array([len(audio)], np.int32)
    padded = np.pad(audio, (0, samples - len(audio)))[None]
    graphdef, state = nnx.split(model)
    output = jax.jit(lambda *arrays: nnx.merge(graphdef, state)(*arrays))(padded, length)
    n = int(output.lengths[0])
    return [
        difference(np.asarray(wanted)[0, :n], found)
        for wanted, found in zip(output.exit_logits, run_exits(folder, audio), strict=True)
    ]


def difference(wanted: np.ndarray, found: np.ndarray) -> Difference:
    """Between logits `[n v]`."""
    gap = np.float64(found) - wanted
    size = np.sqrt(np.mean(np.square(np.float64(wanted))))
    return Difference(
        float(np.abs(gap).max()),
        float(np.sqrt(np.mean(np.square(gap))) / max(size, 1e-12)),
        float(np.mean(wanted.argmax(-1) != found.argmax(-1))),
    )


def speech_like(samples: int, seed: int) -> np.ndarray:
    """float32 `[t]`: harmonics of a gliding pitch, four syllables a second, over a little noise (ours)."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / 16_000
    phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 0.7 * time)) / 16_000
    harmonics = np.arange(1, 20)[:, None]
    voice = (np.sin(harmonics * phase) / harmonics).sum(0)
    syllables = np.square(np.sin(np.pi * 4 * time * (1 + 0.2 * np.sin(time))))
    noise = rng.normal(size=samples)
    return (0.1 * voice * syllables + 0.003 * noise).astype(np.float32)


def evaluations(folder: Path) -> dict[str, Any]:
    """Word error rates that `experiments.evaluate` left in a model's folder, by name."""
    rates = {}
    for path in sorted((folder / "evaluations").glob("*.json")):
        facts = json.loads(path.read_text())
        rates[path.stem] = {"wer": facts["score"]["wer"], "ci": facts["score"]["ci"]}
    return rates
