"""Softmax attention, `softmax(q k^T / sqrt(c)) v`, over the keys that a mask leaves.

Shapes: queries `[b n h c]`, keys and values `[b m h c]`, mask broadcastable to `[b h n m]`, True where a query may see
a key. The softmax is in float32. A query that sees nothing gets a finite value without meaning.
"""

from enum import Enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from edgespeech.types import Array, Bool, Float

# A finite stand-in for minus infinity: a row whose keys are all masked stays finite, forward and backward.
MASKED = -1e30
QUERY_BLOCK = 512
KEY_BLOCK = 8192
SMALL = (
    256**2
)  # entries of the matrix up to which REFERENCE is as fast on a CPU, forward and backward


class AttentionMethod(Enum):
    """How it is computed; all agree to float rounding."""

    AUTO = "auto"
    REFERENCE = "reference"  # the n x m matrix in memory
    BLOCKWISE = "blockwise"  # never more than QUERY_BLOCK x KEY_BLOCK of it; memory linear in n


def attention(
    q: Float[Array, "b n h c"],
    k: Float[Array, "b m h c"],
    v: Float[Array, "b m h c"],
    mask: Bool[Array, "b #h #n m"],
    method: AttentionMethod = AttentionMethod.AUTO,
) -> Float[Array, "b n h c"]:
    """`softmax(q k^T / sqrt(c)) v`, in the dtype of v.

    AUTO takes REFERENCE where the matrix is small enough that it does not matter.
    """
    # Median ms, 12 heads of 64, batch 1, 2 CPU cores, jax 0.10.2, 2026-11-20, at 500, 1500, 3000 and 6000 frames:
    # REFERENCE 9, 92, 311 and out of proportion; BLOCKWISE 4, 27, 114, 410; torch 2.13 SDPA 5, 39, 152, 611.
    if method is AttentionMethod.AUTO:
        small = q.shape[1] * k.shape[1] <= SMALL
        method = AttentionMethod.REFERENCE if small else AttentionMethod.BLOCKWISE
    form = attention_reference if method is AttentionMethod.REFERENCE else _attention_blockwise
    return form(q, k, v, mask)


def attention_reference(
    q: Float[Array, "b n h c"],
    k: Float[Array, "b m h c"],
    v: Float[Array, "b m h c"],
    mask: Bool[Array, "b #h #n m"],
) -> Float[Array, "b n h c"]:
    """`attention` with the `n x m` matrix in memory: the form to test against."""
    # Heads ahead of frames: XLA's CPU matrix products are twice as fast on contiguous operands.
    q, k, v = (jnp.swapaxes(t, 1, 2) for t in (q, k, v))
    logits = jnp.einsum("bhnc,bhmc->bhnm", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask, logits * q.shape[-1] ** -0.5, MASKED)
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True)))
    total = jnp.sum(weights, -1, keepdims=True)
    y = jnp.einsum("bhnm,bhmc->bhnc", weights.astype(v.dtype), v) / total.astype(v.dtype)
    return jnp.swapaxes(y, 1, 2)


def _attention_blockwise(q, k, v, mask) -> Float[Array, "b n h c"]:
    mask = jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:]))
    shared = mask.shape[1] == 1  # one mask for all heads
    # A CPU runs one head at a time, whose blocks stay in its cache; accelerators want all of them in one product.
    over: Any = _loop if jax.default_backend() == "cpu" else jax.vmap

    def utterance(operands):
        q, k, v, mask = operands
        if shared:
            return over(lambda x: _one_head(x[0], x[1], x[2], mask[0]))((q, k, v))
        return over(lambda x: _one_head(*x))(operands)

    heads_first = (jnp.swapaxes(t, 1, 2) for t in (q, k, v))
    return jnp.swapaxes(over(utterance)((*heads_first, mask)), 1, 2)


def _loop(function):
    return lambda operands: lax.map(function, operands)


class _Partial(NamedTuple):
    """The softmax over some keys: largest logit M, `T = sum_j exp(logit_j - M)`, Y the same sum over values."""

    largest: Float[Array, "n 1"]
    total: Float[Array, "n 1"]
    y: Float[Array, "n c"]


def _attend(q, k, v, bias) -> _Partial:
    logits = jnp.einsum("qc,kc->qk", q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5 + bias
    largest = lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    y = jnp.einsum("qk,kc->qc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return _Partial(largest, weights.sum(-1, keepdims=True), y)


def _merge(a: _Partial, b: _Partial) -> _Partial:
    """The online softmax (Milakov & Gimelshein, arXiv 1805.02867): both parts brought to the larger of their maxima."""
    largest = jnp.maximum(a.largest, b.largest)
    scale_a, scale_b = jnp.exp(a.largest - largest), jnp.exp(b.largest - largest)
    return _Partial(largest, a.total * scale_a + b.total * scale_b, a.y * scale_a + b.y * scale_b)


def _one_head(
    q: Float[Array, "n c"],
    k: Float[Array, "m c"],
    v: Float[Array, "m c"],
    mask: Bool[Array, "#n m"],
) -> Float[Array, "n c"]:
    """Blocks of queries, each over blocks of keys."""
    n = q.shape[0]
    q_blocks, k_blocks, v_blocks = (
        _blocks(x, most) for x, most in ((q, QUERY_BLOCK), (k, KEY_BLOCK), (v, KEY_BLOCK))
    )
    # Padded keys are masked; padded queries are cut off at the end. The mask is added, not selected by, which would
    # take longer than the sum.
    bias = jnp.where(jnp.moveaxis(_blocks(mask.T, KEY_BLOCK), -1, 0), 0.0, MASKED)
    has_rows = bias.shape[0] > 1
    bias = (
        _blocks(bias, QUERY_BLOCK) if has_rows else bias
    )  # [(query blocks,) #queries, key blocks, keys]

    # The matrix of a block is computed anew for the gradient: kept, all of them together are n x m.
    @jax.checkpoint
    def query_block(operands):
        q, bias = operands
        keys = (k_blocks, v_blocks, jnp.moveaxis(bias, 1, 0))
        state = _attend(q, *(x[0] for x in keys))
        if k_blocks.shape[0] > 1:
            more = tuple(x[1:] for x in keys)
            state, _ = lax.scan(
                lambda state, block: (_merge(state, _attend(q, *block)), None), state, more
            )
        return (state.y / state.total).astype(v.dtype)

    if has_rows:
        blocks = lax.map(query_block, (q_blocks, bias))
    else:
        blocks = lax.map(lambda q: query_block((q, bias)), q_blocks)
    return blocks.reshape(-1, v.shape[-1])[:n]


def _blocks(x: Float[Array, "n ..."], most: int) -> Float[Array, "g s ..."]:
    """Equal blocks of at most `most` rows, the last one filled with zeros."""
    count = max(1, -(-x.shape[0] // most))
    size = -(-x.shape[0] // count)
    x = jnp.pad(x, ((0, count * size - x.shape[0]),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(count, size, *x.shape[1:])
