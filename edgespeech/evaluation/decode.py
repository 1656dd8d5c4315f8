"""Greedy transcripts of a corpus, scored."""

import jax
import numpy as np
from flax import nnx

from edgespeech.data.batching import BatchSource
from edgespeech.data.tokenizer import Tokenizer, ctc_collapse
from edgespeech.evaluation.wer import WerResult, score
from edgespeech.ops.ctc import greedy_path


class GreedyDecoder:
    """Batched greedy CTC decoding: one compilation for each batch shape and model structure.

    Args:
        graphdef: of a model that returns a `CTCOutput`.
        tokenizer: turns tokens into text.
    """

    def __init__(self, graphdef: nnx.GraphDef, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

        @jax.jit
        def path(state, audio, lengths):
            output = nnx.merge(graphdef, state)(audio, lengths)
            return greedy_path(output.logits, output.lengths)

        self._path = path

    def score(self, state, source: BatchSource) -> WerResult:
        """Word errors over every utterance of a source, in the corpus's order."""
        texts: dict[int, str] = {}
        for batch in source.eval_batches():
            paths = np.asarray(self._path(state, batch.audio, batch.audio_lengths))
            for row, path in zip(batch.index, paths, strict=True):
                if row >= 0:
                    texts[int(row)] = self._tokenizer.decode(ctc_collapse(path))
        rows = sorted(texts)
        utterances = [source.corpus.utterances[row] for row in rows]
        return score(
            [u.id for u in utterances], [u.text for u in utterances], [texts[row] for row in rows]
        )
