"""CTC transcripts by beam search, on the device or with a language model on the host."""

import jax
import numpy as np
from flax import nnx

from edgespeech.data.batching import Batch
from edgespeech.evaluation.decode import Decoder
from edgespeech.inference.fusion import FusionBeam, FusionConfig
from edgespeech.inference.language_model import NgramModel
from edgespeech.inference.words import TextTokenizer, token_texts
from edgespeech.ops.ctc import ctc_log_probs
from edgespeech.ops.ctc_beam import ctc_beam_search


class BeamDecoder(Decoder):
    """Batched CTC prefix beam search on the device: the most likely label sequence.

    Args:
        graphdef: of a model that returns a `CTCOutput`.
        tokenizer: turns tokens into text.
        beam_width: sequences kept at each frame.
    """

    def __init__(self, graphdef: nnx.GraphDef, tokenizer: TextTokenizer, beam_width: int):
        self._tokenizer = tokenizer

        @jax.jit
        def search(state, audio, lengths):
            output = nnx.merge(graphdef, state)(audio, lengths)
            beams = ctc_beam_search(output.logits, output.lengths, beam_width)
            return beams.tokens[:, 0], beams.lengths[:, 0]

        self._search = search

    def texts(self, state: nnx.State, batch: Batch) -> list[str]:
        """See `Decoder`."""
        best = jax.device_get(self._search(state, batch.audio, batch.audio_lengths))
        return [self._tokenizer.decode(tokens[:n]) for tokens, n in zip(*best, strict=True)]


class FusionDecoder(Decoder):
    """Beam search with a word language model and hot words: the model on the device, the search on the host.

    Args:
        graphdef: of a model that returns a `CTCOutput`.
        tokenizer: turns tokens into text.
        config: of the search.
        language_model: None: hot words and the bonus of a word alone.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        tokenizer: TextTokenizer,
        config: FusionConfig,
        language_model: NgramModel | None = None,
    ):
        self._beam = FusionBeam(token_texts(tokenizer), config, language_model)

        @jax.jit
        def log_probs(state, audio, lengths):
            output = nnx.merge(graphdef, state)(audio, lengths)
            return ctc_log_probs(output.logits), output.lengths

        self._log_probs = log_probs

    def texts(self, state: nnx.State, batch: Batch) -> list[str]:
        """See `Decoder`."""
        scores, lengths = jax.device_get(self._log_probs(state, batch.audio, batch.audio_lengths))
        lengths = np.where(batch.weights > 0, lengths, 0)  # filler rows are not searched
        return [self._beam(row[:n])[0].text for row, n in zip(scores, lengths, strict=True)]
