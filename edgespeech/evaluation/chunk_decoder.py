"""Transcripts of a corpus from a streaming model: whole with any chunks, or live."""

import jax
import numpy as np
from flax import nnx

from edgespeech.data.batching import Batch
from edgespeech.data.tokenizer import Tokenizer, ctc_collapse
from edgespeech.evaluation.decode import Decoder
from edgespeech.inference.streaming import Streamer
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.nn.chunk_attention import FULL_CONTEXT
from edgespeech.ops.ctc import greedy_path
from edgespeech.types import SAMPLE_RATE

STREAMS = 8  # of a `LiveDecoder`, at a time


class ChunkDecoder(Decoder):
    """Greedy decoding of whole recordings; what a frame sees is data, and one program serves every choice.

    Attributes:
        chunks: what a frame sees.
    """

    def __init__(self, model: EdgeConformer, tokenizer: Tokenizer):
        self.chunks = FULL_CONTEXT
        self._tokenizer = tokenizer
        graphdef = nnx.graphdef(model)

        @jax.jit
        def path(state, audio, lengths, chunks):
            return greedy_path(*nnx.merge(graphdef, state)(audio, lengths, chunks))

        self._path = path

    def texts(self, state: nnx.State, batch: Batch) -> list[str]:
        """See `Decoder`."""
        paths = np.asarray(self._path(state, batch.audio, batch.audio_lengths, self.chunks))
        return [self._tokenizer.decode(ctc_collapse(path)) for path in paths]


class LiveDecoder(Decoder):
    """Every recording fed to a `Streamer` in blocks of 100 ms, several at a time."""

    def __init__(self, model: EdgeConformer, tokenizer: Tokenizer):
        # Without endpoints: a pause within a word would end it, and the whole knows no pauses.
        self._streamer = Streamer(model, tokenizer, num_streams=STREAMS, endpoint_seconds=1e6)

    def texts(self, state: nnx.State, batch: Batch) -> list[str]:
        """See `Decoder`; the state is the streamer's own."""
        del state
        texts: list[str] = []
        for start in range(0, len(batch.audio), STREAMS):
            rows = range(start, min(start + STREAMS, len(batch.audio)))
            words: list[list] = [[] for _ in rows]
            for stream in range(len(rows)):
                self._streamer.reset(stream)
            longest = int(max(batch.audio_lengths[row] for row in rows))
            for begin in range(0, longest, SAMPLE_RATE // 10):
                end = begin + SAMPLE_RATE // 10
                blocks = {
                    stream: np.asarray(batch.audio[row, begin : min(end, batch.audio_lengths[row])])
                    for stream, row in enumerate(rows)
                }
                for stream, update in self._streamer.feed(blocks).items():
                    words[stream] += update.final
            for stream in range(len(rows)):
                words[stream] += self._streamer.close(stream).final
            texts += [" ".join(word.text for word in row) for row in words]
        return texts
