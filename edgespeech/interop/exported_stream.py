"""An exported step at work: audio in pieces of any length, words out, and how far it is from its model."""

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from edgespeech.errors import InputError
from edgespeech.inference.stream_words import GreedyWords, ends_word
from edgespeech.inference.streaming import Update
from edgespeech.inference.words import Word
from edgespeech.interop.exported import open_exported
from edgespeech.interop.parity import Difference, difference, speech_like
from edgespeech.interop.streaming_export import state_path, step_function
from edgespeech.models.edge_conformer import EdgeConformer


class ExportedStream:
    """One stream through an exported step, in the file's own runtime: pieces of audio in, words of greedy CTC out.

    What it gives is what `inference.streaming.Streamer` gives of the model that the file was made of.

    Args:
        path: of the file; its manifest and its first state lie beside it.
        threads: of ONNX Runtime; XLA takes the cores that the process may use.
        endpoint_seconds: time without a token after which the speaker has stopped.

    Attributes:
        manifest: what is known about the file.
        state: leaves by name, after the last chunk.

    Raises:
        InputError: a file is missing or damaged, or holds no step; endpoint_seconds is not above 0.
    """

    def __init__(
        self, path: str | Path, *, threads: int | None = None, endpoint_seconds: float = 0.8
    ):
        if not endpoint_seconds > 0:
            raise InputError(f"endpoint_seconds is {endpoint_seconds}: it must be above 0")
        run, self.manifest = open_exported(path, threads)
        if "state" not in self.manifest:
            raise InputError(
                f"{path} takes whole recordings: `edgespeech export --streaming` writes a step"
            )
        self._run = run
        self._initial = _read_state(state_path(Path(path)), self.manifest["state"]["leaves"])
        self._ends_word = ends_word(self.manifest["vocabulary"])
        self._endpoint_seconds = endpoint_seconds
        self.reset()

    @property
    def chunk(self) -> int:
        """Samples of a step."""
        return self.manifest["chunk_samples"]

    def reset(self) -> None:
        """Starts a new stream."""
        self.state: dict[str, Any] = dict(self._initial)
        self._pending = np.zeros(0, np.float32)
        self._words = GreedyWords(
            self.manifest["vocabulary"], self.manifest["frame_seconds"], self._endpoint_seconds
        )
        self._is_closed = False

    def step(self, samples: np.ndarray) -> np.ndarray:
        """Logits `[n v]` of the frames that a chunk completes; the state goes on.

        Args:
            samples: float `[t]` in [-1, 1] at 16 kHz, t the file's chunk, or less at the stream's end.

        Raises:
            InputError: more samples than the chunk.
        """
        if len(samples) > self.chunk:
            raise InputError(
                f"{len(samples)} samples for a step of {self.chunk}: `feed` takes any length"
            )
        audio = np.pad(np.float32(samples), (0, self.chunk - len(samples)))[None]
        length = np.array([len(samples)], np.int32)
        logits, frames, *after = self._run(audio, length, *self.state.values())
        self.state = dict(zip(self.state, after, strict=True))
        return np.asarray(logits)[0, : int(np.asarray(frames)[0])]

    def feed(self, samples: np.ndarray) -> Update:
        """Takes the next audio, float `[t]` in [-1, 1] at 16 kHz of any length; returns what is new.

        Raises:
            InputError: the stream is closed, or the samples are not a vector of finite floats; nothing was taken then.
        """
        if self._is_closed:
            raise InputError("the stream is closed: reset() starts a new one")
        samples = np.asarray(samples)
        if samples.ndim != 1 or samples.dtype.kind != "f" or not np.isfinite(samples).all():
            raise InputError(
                f"the samples are {samples.dtype} of shape {list(samples.shape)}, or hold NaN: give finite floats of "
                "shape [t] in [-1, 1] at 16 kHz"
            )
        pending = np.concatenate([self._pending, np.clip(np.float32(samples), -1.0, 1.0)])
        whole = len(pending) - len(pending) % self.chunk
        self._pending = pending[whole:]
        final: list[Word] = []
        ended = False
        for chunk in pending[:whole].reshape(-1, self.chunk):
            final += self._push(self.step(chunk))
            ended |= self._words.ended
        return Update(tuple(final), self._words.partial(), ended)

    def close(self) -> Update:
        """Ends the stream: runs what is left of its audio; all of its words are final.

        Raises:
            InputError: the stream is closed.
        """
        if self._is_closed:
            raise InputError("the stream is closed: reset() starts a new one")
        self._is_closed = True
        final = self._push(self.step(self._pending)) if len(self._pending) else []
        return Update((*final, *self._words.end()), None, True)

    def _push(self, logits: np.ndarray) -> list[Word]:
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        posterior = weights / weights.sum(-1, keepdims=True)
        return self._words.push(logits.argmax(-1), posterior @ self._ends_word)


def _read_state(path: Path, leaves: dict[str, Any]) -> dict[str, np.ndarray]:
    """The state before the first chunk, its leaves in the manifest's order."""
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in leaves}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is missing or damaged ({error}): copy it with its file, or export again"
        ) from error


class StepDifference(NamedTuple):
    """Between a file's steps and the model's.

    Attributes:
        logits: see `parity.Difference`.
        state: largest absolute difference of a leaf after the last step, over its largest value or 1.
    """

    logits: Difference
    state: float


def compare_steps(
    model: EdgeConformer, stream: ExportedStream, chunks: int = 6, seed: int = 0
) -> StepDifference:
    """Runs both on the same chunks, the last of them two thirds full, each carrying its own state.

    Args:
        model: what the file was made of, with the same `set_chunks`.
        stream: new, or after `reset`.
        chunks: how many.
        seed: of the audio.
    """
    call, state = step_function(model)
    call = jax.jit(call)
    audio = speech_like(chunks * stream.chunk, seed)[: -(stream.chunk // 3)]
    wanted, found = [], []
    for start in range(0, len(audio), stream.chunk):
        chunk = audio[start : start + stream.chunk]
        found.append(stream.step(chunk))
        padded = np.pad(chunk, (0, stream.chunk - len(chunk)))[None]
        logits, frames, *after = call(padded, np.array([len(chunk)], np.int32), *state.values())
        state = dict(zip(state, map(np.asarray, after), strict=True))
        wanted.append(np.asarray(logits)[0, : int(frames[0])])
    gaps = (
        np.abs(np.float64(stream.state[name]) - leaf).max() / max(1.0, np.abs(leaf).max())
        for name, leaf in state.items()
    )
    return StepDifference(
        difference(np.concatenate(wanted), np.concatenate(found)), float(max(gaps))
    )
