"""Softmax attention over valid positions."""

import jax
import jax.numpy as jnp

from edgespeech.types import Array, Bool, Float

# A finite stand-in for minus infinity: a row whose keys are all masked stays finite, forward and backward.
MASKED = -1e30


def attention_reference(
    q: Float[Array, "b n h c"],
    k: Float[Array, "b m h c"],
    v: Float[Array, "b m h c"],
    mask: Bool[Array, "b #h #n m"],
) -> Float[Array, "b n h c"]:
    """`softmax(q k^T / sqrt(c)) v` with the `n x m` matrix in memory; the softmax is in float32.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: True where a query may see a key; broadcast over heads and queries.
    """
    # Heads ahead of frames: XLA's CPU matrix products are twice as fast on contiguous operands.
    q, k, v = (jnp.swapaxes(t, 1, 2) for t in (q, k, v))
    logits = jnp.einsum("bhnc,bhmc->bhnm", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask, logits * q.shape[-1] ** -0.5, MASKED)
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True)))
    total = jnp.sum(weights, -1, keepdims=True)
    y = jnp.einsum("bhnm,bhmc->bhnc", weights.astype(v.dtype), v) / total.astype(v.dtype)
    return jnp.swapaxes(y, 1, 2)
