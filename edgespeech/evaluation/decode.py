"""Greedy transcripts of a corpus, scored."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx

from edgespeech.data.batching import Batch, BatchSource
from edgespeech.data.tokenizer import ctc_collapse
from edgespeech.evaluation.plain_text import plain_text
from edgespeech.evaluation.wer import WerResult, score
from edgespeech.inference.seq2seq import TOKENS_PER_SECOND, greedy_search, token_limits
from edgespeech.ops.ctc import greedy_path
from edgespeech.types import SAMPLE_RATE


class TextOfIds(Protocol):
    """A tokenizer, as far as it is needed here."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        ...


class Decoder(ABC):
    """From batches to texts, and to word errors; the model's state is an argument, its structure is not."""

    @abstractmethod
    def texts(self, state: nnx.State, batch: Batch) -> list[str]:
        """What is heard in every row of a batch, filler rows included."""

    def compared(self, text: str) -> str:
        """The form in which reference and hypothesis are compared; here as they are."""
        return text

    def score(self, state: nnx.State, source: BatchSource) -> WerResult:
        """Word errors over every utterance of a source, in the corpus's order."""
        heard: dict[int, str] = {}
        for batch in source.eval_batches():
            for row, text in zip(batch.index, self.texts(state, batch), strict=True):
                if row >= 0:
                    heard[int(row)] = text
        rows = sorted(heard)
        utterances = [source.corpus.utterances[row] for row in rows]
        return score(
            [u.id for u in utterances],
            [self.compared(u.text) for u in utterances],
            [self.compared(heard[row]) for row in rows],
        )


class GreedyDecoder(Decoder):
    """Batched greedy CTC decoding: one compilation for each batch shape and model structure.

    Args:
        graphdef: of a model that returns a `CTCOutput`.
        tokenizer: turns tokens into text.
    """

    def __init__(self, graphdef: nnx.GraphDef, tokenizer: TextOfIds):
        self._tokenizer = tokenizer

        @jax.jit
        def path(state, audio, lengths):
            output = nnx.merge(graphdef, state)(audio, lengths)
            return greedy_path(output.logits, output.lengths)

        self._path = path

    def texts(self, state: nnx.State, batch: Batch) -> list[str]:
        """See `Decoder`."""
        paths = np.asarray(self._path(state, batch.audio, batch.audio_lengths))
        return [self._tokenizer.decode(ctc_collapse(path)) for path in paths]


class TokenText(NamedTuple):
    """A text as an encoder-decoder wrote it.

    Attributes:
        tokens: without the end token.
        ended: it was found; otherwise the text was cut off at its limit, as one that repeats itself is.
    """

    tokens: list[int]
    ended: bool


class Seq2SeqDecoder(Decoder):
    """Batched greedy decoding of an encoder-decoder: one compilation for each batch shape and model structure.

    Texts are compared without case and punctuation: see `plain_text`.

    Args:
        graphdef: of a Moonshine.
        tokenizer: turns tokens into text.
        tokens_per_second: the limit of a text's length: see `token_limits`.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        tokenizer: TextOfIds,
        tokens_per_second: float = TOKENS_PER_SECOND,
    ):
        self._tokenizer = tokenizer
        self._tokens_per_second = tokens_per_second

        @jax.jit
        def search(state, audio, lengths, limits):
            model = nnx.merge(graphdef, state)
            memory, memory_lengths, _ = model.encode(audio, lengths)
            size = math.ceil(audio.shape[1] / SAMPLE_RATE * tokens_per_second)
            return greedy_search(model, memory, memory_lengths, limits, size)

        self._search = search

    def token_texts(self, state: nnx.State, batch: Batch) -> list[TokenText]:
        """What is heard in every row of a batch as tokens; nothing in filler rows."""
        limits = token_limits(batch.audio_lengths, self._tokens_per_second)
        limits = np.where(batch.weights > 0, limits, 0).astype(np.int32)
        decoded = jax.device_get(self._search(state, batch.audio, batch.audio_lengths, limits))
        return [
            TokenText(tokens[:length].tolist(), bool(length < limit))
            for tokens, length, limit in zip(decoded.tokens, decoded.lengths, limits, strict=True)
        ]

    def texts(self, state: nnx.State, batch: Batch) -> list[str]:
        """See `Decoder`."""
        return [self._tokenizer.decode(text.tokens) for text in self.token_texts(state, batch)]

    def compared(self, text: str) -> str:
        """See `Decoder`."""
        return plain_text(text)
