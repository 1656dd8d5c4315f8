"""Transcripts by beam search against the plain search on the model's own scores."""

import jax
import numpy as np
from flax import nnx

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.evaluation.beam_decoder import BeamDecoder, FusionDecoder
from edgespeech.inference.fusion import FusionConfig
from edgespeech.inference.language_model import Entry, NgramModel
from edgespeech.ops.ctc_beam import ctc_beam_search_reference
from tests.support.modules import randomize
from tests.support.tiny import batch_with_filler, tiny_model, tone_source

WIDTH = 4


def test_both_searches():
    """Filler rows are not searched on the host; a language model of one word has no say but over that word."""
    model = randomize(tiny_model(seed=2, conv_strides=2), 3, 0.4)
    graphdef, state = nnx.split(model)
    batch = batch_with_filler(tone_source())
    output = jax.jit(lambda *inputs: model(*inputs))(batch.audio, batch.audio_lengths)
    logits = np.float64(output.logits)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    real = np.flatnonzero(batch.weights > 0)
    best = [
        ctc_beam_search_reference(log_probs[row, : int(output.lengths[row])], WIDTH)[0][0]
        for row in real
    ]
    want = [CharTokenizer().decode(tokens) for tokens in best]
    assert len(set(want)) > 1

    on_device = BeamDecoder(graphdef, CharTokenizer(), WIDTH).texts(state, batch)
    assert [on_device[row] for row in real] == want

    config = FusionConfig(beam_width=WIDTH, lm_weight=0.0, least_log_prob=-np.inf)
    nothing = NgramModel({("A",): Entry(-1.0, 0.0)})
    for language_model in (None, nothing):
        decoder = FusionDecoder(graphdef, CharTokenizer(), config, language_model)
        texts = decoder.texts(state, batch)
        assert [texts[row] for row in real] == want
        assert all(not texts[row] for row in set(range(len(texts))) - set(real))
