"""Greedy CTC transcripts of files of any length in bounded memory, with the time of every word."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.inference.audio_blocks import (
    cut,
    open_sound,
    read_blocks,
    require_overlap,
    resampled,
)
from edgespeech.inference.compiling import inference_options
from edgespeech.inference.words import TextTokenizer, Word, text_of, token_texts, words_of_path
from edgespeech.nn.kept_gates import keep_gates
from edgespeech.ops.ctc import greedy_path
from edgespeech.types import SAMPLE_RATE

LEAST_SECONDS = 2.0  # shorter audio is filled up to this: fewer programs are compiled


class Transcript(NamedTuple):
    """What was heard in a recording.

    Attributes:
        words: with their times.
        seconds: duration of the recording.
    """

    words: list[Word]
    seconds: float

    @property
    def text(self) -> str:
        """The words with a space between them."""
        return text_of(self.words)


class LongAudio:
    """Transcribes recordings of any length, segment by segment.

    A recording up to a segment's length is one segment. Of a longer one, segments of equal length overlap. Both
    neighbours label the frames of an overlap; of these, the first half is taken from the segment before and the second
    half from the one after, so that every frame but those at the ends of the recording has at least half an overlap of
    context on each side. What is joined are the labels of frames: a token that lies across a joint is neither lost nor
    doubled. The segments start on the grid of the encoder's frames, so the labels are those of the whole recording for
    every model that sees no further than half an overlap. A model that sees more, such as attention, or a norm over the
    utterance, has the segment for its utterance, which keeps to the lengths that it was trained on.

    Memory is that of a segment, and a label for every frame.

    Args:
        model: returns `.logits [b n v]` and `.lengths [b]` from `(audio [b t], lengths [b])`; its `config` gives
            `num_frames` and `frame_seconds`.
        tokenizer: of its vocabulary.
        segment_seconds: length of a segment.
        overlap_seconds: what neighbours share.

    Raises:
        InputError: the overlap is not between 0 and half a segment.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: TextTokenizer,
        *,
        segment_seconds: float = 30.0,
        overlap_seconds: float = 6.0,
    ):
        require_overlap(segment_seconds, overlap_seconds)
        self._config = model.config
        self._texts = token_texts(tokenizer)
        self._segment = round(segment_seconds * SAMPLE_RATE)
        frame = round(self._config.frame_seconds * SAMPLE_RATE)
        self._shared = max(1, round(overlap_seconds / self._config.frame_seconds))
        self._step = self._config.num_frames(self._segment) - self._shared  # frames
        if self._step < 1:
            raise InputError(
                f"segments of {segment_seconds:g} s hold no frame beside their overlap: choose longer ones"
            )
        self._hop = self._step * frame
        frames = self._config.num_frames(self._segment)
        own = nnx.merge(*nnx.split(model))  # the caller's model keeps nothing
        graphdef, self._state = nnx.split(keep_gates(own, jnp.full(1, frames), frames))

        def path(state, audio, lengths):
            output = nnx.merge(graphdef, state)(audio, lengths)
            return greedy_path(output.logits, output.lengths)

        self._path = jax.jit(path, compiler_options=inference_options())

    def file(self, path: str | os.PathLike) -> Transcript:
        """Transcribes a file: WAV, FLAC, Ogg (Vorbis, Opus) or MP3, any rate, the mean of its channels.

        Raises:
            InputError: naming the file: unreadable, empty, NaN or infinite samples.
        """
        path = Path(path)
        with open_sound(path) as sound:
            mono = (block.mean(0, keepdims=True) for block in read_blocks(sound, path))
            blocks = resampled(mono, 1, sound.samplerate, SAMPLE_RATE)
            return self.stream(np.clip(block[0], -1.0, 1.0) for block in blocks)

    def stream(self, blocks: Iterable[np.ndarray]) -> Transcript:
        """Transcribes a stream of float32 `[any]` pieces in [-1, 1] at 16 kHz."""
        samples = 0

        def counted() -> Iterator[np.ndarray]:
            nonlocal samples
            for block in blocks:
                samples += len(block)
                yield block[None]

        labels: list[np.ndarray] = []
        margin = self._shared // 2
        for index, (piece, is_last) in enumerate(cut(counted(), self._segment, self._hop)):
            path = self._labels(piece)
            start = margin if index else 0
            labels.append(path[start:] if is_last else path[start : margin + self._step])
        words = words_of_path(
            np.concatenate(labels or [np.zeros(0, np.int32)]),
            self._texts,
            self._config.frame_seconds,
        )
        return Transcript(words, samples / SAMPLE_RATE)

    def _labels(self, piece: np.ndarray) -> np.ndarray:
        """Label of every frame of a segment `[1 t]`; audio too short for a frame has none."""
        length = piece.shape[1]
        size = self._segment
        while size // 2 >= max(length, LEAST_SECONDS * SAMPLE_RATE):
            size //= 2
        audio = np.pad(piece, ((0, 0), (0, size - length)))
        path = self._path(self._state, audio, np.array([length], np.int32))
        return np.asarray(path)[0, : self._config.num_frames(length)]
