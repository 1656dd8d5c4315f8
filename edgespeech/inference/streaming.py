"""Live audio to words: many streams in one batch, each with its own beginning, pace and end."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import soxr
from flax import nnx

from edgespeech.data.audio import MAX_AMPLITUDE, RATES
from edgespeech.errors import InputError
from edgespeech.inference.stream_words import GreedyWords, ends_word
from edgespeech.inference.words import TextTokenizer, Word, token_texts
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.types import SAMPLE_RATE

# As of audio files: a codec may overshoot 1 a little, integers stored as floats exceed it by far.


class Update(NamedTuple):
    """What a block brought.

    Attributes:
        final: words that became final; each is given once and does not change any more.
        partial: the word that is not ended yet, as far as it is heard; None where there is none.
        endpoint: the speaker has just stopped: words before this are final.
    """

    final: tuple[Word, ...]
    partial: Word | None
    endpoint: bool


class _Stream:
    """Audio that waits, and words that are open, of one stream."""

    def __init__(self, words: GreedyWords):
        self.words = words
        self.pending = np.zeros(0, np.float32)
        self.rate: int | None = None
        self.resampler: soxr.ResampleStream | None = None
        self.is_closed = False

    def append(self, block: np.ndarray, last: bool = False) -> None:
        if self.resampler is not None:
            block = self.resampler.resample_chunk(block, last=last)
        self.pending = np.concatenate([self.pending, np.clip(block, -1.0, 1.0)])

    def take(self, count: int) -> np.ndarray:
        taken, self.pending = self.pending[:count], self.pending[count:]
        return taken


class Streamer:
    """Feeds audio of any block size to a streaming model, and gives the words of greedy CTC decoding as they come.

    All streams run through one compiled step, a chunk at a time; one without a whole chunk of new audio stays as it
    is. Greedy decoding of a fixed mask never takes a token back, so the text is that of the whole recording with the
    same chunks, but that a pause of `endpoint_seconds` ends a word.

    Args:
        model: in inference; its `set_chunks` decides latency and past. Later changes of it are not seen.
        tokenizer: of its vocabulary, blank 0.
        num_streams: streams 0, 1, ... of the batch; all are open at first.
        endpoint_seconds: time without a token after which the speaker has stopped.

    Raises:
        InputError: num_streams or endpoint_seconds is not above 0, or every token starts a word.
    """

    def __init__(
        self,
        model: EdgeConformer,
        tokenizer: TextTokenizer,
        *,
        num_streams: int = 1,
        endpoint_seconds: float = 0.8,
    ):
        if num_streams < 1 or not endpoint_seconds > 0:
            raise InputError(
                f"num_streams is {num_streams} and endpoint_seconds {endpoint_seconds}: both must be above 0"
            )
        self._chunk = model.chunk
        self._texts = token_texts(tokenizer)
        self._frame_seconds = model.config.frame_seconds
        self._endpoint_seconds = endpoint_seconds
        self._streams = [self._new_stream() for _ in range(num_streams)]
        graphdef, self._parameters = nnx.split(model)
        ends = jnp.asarray(ends_word(self._texts))
        start = model.init_state(num_streams)

        @jax.jit
        def step(parameters, audio, lengths, state):
            logits, frames, state = nnx.merge(graphdef, parameters).step(audio, lengths, state)
            posterior = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
            return jnp.argmax(logits, axis=-1), posterior @ ends, frames, state

        @jax.jit
        def restart(state, stream):
            def restarted(old, new):
                here = jnp.arange(num_streams) == stream
                return jnp.where(here.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

            return jax.tree.map(restarted, state, start)

        self._step, self._restart = step, restart
        self._state = start

    @property
    def chunk_seconds(self) -> float:
        """Audio of one step: a word comes at most so long after its end, besides the time of computing."""
        return self._chunk / SAMPLE_RATE

    def feed(
        self, blocks: Mapping[int, np.ndarray], sample_rate: int = SAMPLE_RATE
    ) -> dict[int, Update]:
        """Takes the next audio of some streams, and runs every chunk that is complete with it.

        Silence is audio as any other; an empty block brings nothing; samples outside [-1, 1] up to 2 are clipped.

        Args:
            blocks: by stream, float `[t]` in [-1, 1], t from 0 on.
            sample_rate: of these blocks, Hz; resampled to 16 kHz by soxr. A stream keeps the rate of its first block.

        Returns:
            for each of these streams, what is new.

        Raises:
            InputError: a stream is closed or does not exist, or a block is not audio: of another shape or type, with
                NaN, far outside [-1, 1], or at another rate than its stream's. Nothing of this call was taken then,
                and every stream goes on.
        """
        for stream, block in blocks.items():
            self._check(stream, block, sample_rate)
        for stream, block in blocks.items():
            self._accept(self._streams[stream], np.asarray(block, np.float32), sample_rate)
        final: dict[int, list[Word]] = {stream: [] for stream in blocks}
        ended = dict.fromkeys(blocks, False)
        while ready := [s for s in blocks if len(self._streams[s].pending) >= self._chunk]:
            for stream, words in self._advance(ready).items():
                final[stream] += words
                ended[stream] |= self._streams[stream].words.ended
        return {
            stream: Update(
                tuple(final[stream]), self._streams[stream].words.partial(), ended[stream]
            )
            for stream in blocks
        }

    def close(self, stream: int) -> Update:
        """Ends a stream: runs what is left of its audio; all of its words are final.

        Raises:
            InputError: the stream is closed or does not exist.
        """
        self._check(stream, np.zeros(0, np.float32), None)
        one = self._streams[stream]
        one.append(np.zeros(0, np.float32), last=True)
        final = []
        while len(one.pending):
            final += self._advance([stream])[stream]
        final += one.words.end()
        one.is_closed = True
        return Update(tuple(final), None, True)

    def reset(self, stream: int) -> None:
        """Starts a new stream in the place of one, closed or not, whose audio and words are forgotten.

        Raises:
            InputError: the stream does not exist.
        """
        self._check_exists(stream)
        self._streams[stream] = self._new_stream()
        self._state = self._restart(self._state, stream)

    def _new_stream(self) -> _Stream:
        return _Stream(GreedyWords(self._texts, self._frame_seconds, self._endpoint_seconds))

    def _advance(self, ready: Sequence[int]) -> dict[int, list[Word]]:
        """Runs at most one chunk of each of these streams; returns words that became final."""
        audio = np.zeros((len(self._streams), self._chunk), np.float32)
        lengths = np.zeros(len(self._streams), np.int32)
        for stream in ready:
            samples = self._streams[stream].take(self._chunk)
            audio[stream, : len(samples)] = samples
            lengths[stream] = len(samples)
        tokens, certainty, frames, self._state = self._step(
            self._parameters, audio, lengths, self._state
        )
        tokens, certainty, frames = jax.device_get((tokens, certainty, frames))
        return {
            stream: self._streams[stream].words.push(
                tokens[stream, : frames[stream]], certainty[stream, : frames[stream]]
            )
            for stream in ready
        }

    def _accept(self, stream: _Stream, block: np.ndarray, sample_rate: int) -> None:
        if stream.rate is None and len(block):
            stream.rate = sample_rate
            if sample_rate != SAMPLE_RATE:
                stream.resampler = soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1, "float32")
        stream.append(block)

    def _check_exists(self, stream: int) -> None:
        if not 0 <= stream < len(self._streams):
            raise InputError(
                f"stream {stream} does not exist: there are 0 to {len(self._streams) - 1}; "
                "make the Streamer with more num_streams"
            )

    def _check(self, stream: int, block: np.ndarray, sample_rate: int | None) -> None:
        self._check_exists(stream)
        one = self._streams[stream]
        if one.is_closed:
            raise InputError(f"stream {stream} is closed: reset({stream}) starts a new one there")
        if not isinstance(block, np.ndarray) or block.ndim != 1 or block.dtype.kind != "f":
            what = (
                f"{block.dtype} of shape {list(block.shape)}"
                if isinstance(block, np.ndarray)
                else type(block).__name__
            )
            raise InputError(
                f"stream {stream}: the block is {what}: give a float array [t] in [-1, 1] "
                "(edgespeech.data.audio.from_int16 makes one of 16-bit samples)"
            )
        if not np.isfinite(block).all():
            bad = int(np.count_nonzero(~np.isfinite(block)))
            raise InputError(
                f"stream {stream}: the block has {bad} NaN or infinite samples of {len(block)}: drop it, or put "
                "silence in its place"
            )
        peak = float(np.abs(block).max(initial=0.0))
        if peak > MAX_AMPLITUDE:
            raise InputError(
                f"stream {stream}: amplitude reaches {peak:g}, the limit is 1: scale the samples to [-1, 1]"
            )
        if sample_rate is None:
            return
        if not RATES[0] <= sample_rate <= RATES[1]:
            raise InputError(
                f"stream {stream}: sample_rate is {sample_rate} Hz: it must be from {RATES[0]} to {RATES[1]}"
            )
        if one.rate not in (None, sample_rate) and len(block):
            raise InputError(
                f"stream {stream}: sample_rate is {sample_rate} Hz, and was {one.rate} before: keep the rate, or "
                f"reset({stream})"
            )
