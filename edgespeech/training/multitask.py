"""The objective of CTC and an attention decoder together."""

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.data.batching import Batch
from edgespeech.models.edge_conformer_config import draw_chunks
from edgespeech.nn.lpa import anneal
from edgespeech.training.ctc import ctc_per_token, weighted_mean
from edgespeech.training.state import LossFunction

SOFT_SHARE = 0.7  # of the steps: gates of LPA mixers anneal, and are hard in the rest (ours)


def multitask_objective(graphdef: nnx.GraphDef, other: nnx.State, num_steps: int) -> LossFunction:
    """`w ctc / u + (1 - w) (-log p_decoder) / (u + 1)`, nats per token, mean over utterances (Watanabe et al., 2017).

    Chunk size and left context are drawn anew at every step (`draw_chunks`); u are the tokens, and the decoder's
    end counts as one more; w is the config's `ctc_weight`. Dividing by tokens is ours.

    Args:
        graphdef: of an `EdgeConformer`, whose `nnx.Param`s are trained.
        other: its other variables: those of LPA mixers that anneal; none with attention.
        num_steps: of the whole run, over which LPA mixers anneal.
    """

    def loss(params, batch: Batch, key, step):
        model = nnx.merge(graphdef, params, other, copy=True)
        progress = step / (SOFT_SHARE * num_steps)
        anneal(model, jnp.minimum(progress, 1.0), (progress >= 1.0).astype(jnp.float32))
        chunk_key, model_key = jax.random.split(key)
        # A filler row has no frame.
        audio_lengths = jnp.where(batch.weights > 0, batch.audio_lengths, 0)
        chunks = draw_chunks(chunk_key, model.config)
        memory, lengths = model.encode(batch.audio, audio_lengths, chunks, model_key)
        ctc = weighted_mean(ctc_per_token(model.head(memory), lengths, batch), batch.weights)
        text = model.decoder.log_probability(batch.targets, batch.target_lengths, memory, lengths)
        decoder = weighted_mean(-text / (batch.target_lengths + 1), batch.weights)
        w = model.config.ctc_weight
        return w * ctc + (1.0 - w) * decoder, {"ctc": ctc, "decoder": decoder}

    return loss
