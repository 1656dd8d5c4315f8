"""Cross-entropy of a decoder's tokens."""

import jax
import jax.numpy as jnp

from edgespeech.ops.mask import mask_from_lengths
from edgespeech.types import Array, Float, Int, Lengths


def token_cross_entropy(
    logits: Float[Array, "b u v"], labels: Int[Array, "b u"], lengths: Lengths
) -> Float[Array, "b"]:
    """`-sum_i log softmax(logits_i)[labels_i]` over an utterance's own tokens, in float32.

    Args:
        logits: unnormalised; position i predicts label i.
        labels: token ids; what lies beyond a length may be any value.
        lengths: valid labels.
    """
    mask = mask_from_lengths(lengths, labels.shape[1])
    # The padding's label must not reach outside the vocabulary, nor its logits, NaN perhaps, the gradient.
    logits = jnp.where(mask[..., None], logits.astype(jnp.float32), 0.0)
    labels = jnp.where(mask, labels, 0)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(mask, picked, 0.0), axis=1)
