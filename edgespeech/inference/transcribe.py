"""Recordings to text with an encoder-decoder."""

import math
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.inference.seq2seq import (
    TOKENS_PER_SECOND,
    beam_search,
    greedy_search,
    token_limits,
)
from edgespeech.models.moonshine import Moonshine
from edgespeech.types import SAMPLE_RATE


class Decoder(Protocol):
    """A tokenizer, as far as it is needed here."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...


class Transcriber:
    """Transcribes any number of recordings of any length; shapes are rounded up, so that few programs are compiled.

    Args:
        model: teacher or hybrid.
        tokenizer: of its vocabulary.
        beam_width: 1 is greedy search.
        length_penalty: of the beam search.
        tokens_per_second: the limit of a text's length: see `token_limits`.
        batch_size: recordings at a time, neighbours in length.
        bucket_seconds: audio is padded to a multiple of this, which changes no result.

    Raises:
        InputError: batch_size or bucket_seconds is not above 0.
    """

    def __init__(
        self,
        model: Moonshine,
        tokenizer: Decoder,
        *,
        beam_width: int = 1,
        length_penalty: float = 0.0,
        tokens_per_second: float = TOKENS_PER_SECOND,
        batch_size: int = 8,
        bucket_seconds: float = 2.0,
    ):
        if batch_size < 1 or not bucket_seconds > 0:
            raise InputError(
                f"batch_size is {batch_size} and bucket_seconds {bucket_seconds}: both must be above 0"
            )
        self._tokenizer = tokenizer
        self._config = model.config
        self._tokens_per_second = tokens_per_second
        self._batch_size = batch_size
        self._bucket_seconds = bucket_seconds
        graphdef, self._state = nnx.split(model)

        @jax.jit
        def search(state, audio, lengths, limits):
            model = nnx.merge(graphdef, state)
            memory, memory_lengths, _ = model.encode(audio, lengths)
            size = math.ceil(audio.shape[1] / SAMPLE_RATE * tokens_per_second)
            if beam_width == 1:
                return greedy_search(model, memory, memory_lengths, limits, size)
            return beam_search(
                model,
                memory,
                memory_lengths,
                limits,
                size,
                width=beam_width,
                length_penalty=length_penalty,
            )

        self._search = search

    def __call__(self, recordings: Sequence[np.ndarray]) -> list[str]:
        """Texts of float recordings `[t]` in [-1, 1] at 16 kHz, in order; one too short for a frame is empty.

        Raises:
            InputError: a recording is not a vector of finite floats.
        """
        for i, samples in enumerate(recordings):
            if samples.ndim != 1 or samples.dtype.kind != "f" or not np.isfinite(samples).all():
                raise InputError(
                    f"recording {i} is {samples.dtype} of shape {list(samples.shape)}, or holds NaN: give finite "
                    "floats of shape [t] at 16 kHz (edgespeech.data.audio.read_audio reads files so)"
                )
        texts = [""] * len(recordings)
        order = [i for i, r in enumerate(recordings) if self._config.num_frames(len(r))]
        order.sort(key=lambda i: len(recordings[i]))
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            for i, text in zip(rows, self._batch([recordings[i] for i in rows]), strict=True):
                texts[i] = text
        return texts

    def _batch(self, recordings: list[np.ndarray]) -> list[str]:
        lengths = np.zeros(self._batch_size, np.int32)
        lengths[: len(recordings)] = [len(samples) for samples in recordings]
        bucket = math.ceil(self._bucket_seconds * SAMPLE_RATE)
        audio = np.zeros((self._batch_size, -(-lengths.max() // bucket) * bucket), np.float32)
        for row, samples in zip(audio, recordings, strict=False):
            row[: len(samples)] = samples
        limits = token_limits(lengths, self._tokens_per_second)
        decoded = jax.device_get(
            self._search(self._state, jnp.asarray(audio), jnp.asarray(lengths), limits)
        )
        return [
            self._tokenizer.decode(decoded.tokens[i, : decoded.lengths[i]].tolist())
            for i in range(len(recordings))
        ]
