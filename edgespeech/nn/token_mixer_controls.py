"""Token mixers that a claim about LPA is measured against: no attention, and local attention.

The other controls, mean only and local path only, are LPA configs (`LPAConfig.mean_only`,
`LPAConfig.local_only`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from edgespeech.errors import InputError
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import copy_module
from edgespeech.ops.attention import MASKED
from edgespeech.types import Array, Float, Frames, Lengths, Mask


class Removed(nnx.Module):
    """Attention taken out: the mixer's output is zero, so the residual passes alone.

    Removing attention from a trained speech transformer's layers: arXiv 2409.16302.
    """

    def __call__(self, x: Frames, lengths: Lengths) -> Frames:
        """`[b n d], [b] -> [b n d]`, zeros."""
        return jnp.zeros_like(x)


class SlidingWindowAttention(SelfAttention):
    """Self-attention in which a frame sees the `window` frames on each side of it, and itself.

        y_i = sum_j softmax_j(q_i.k_j / sqrt(c)) v_j,   |i - j| <= window, j valid

    Exact, in O(n window) time and memory: blocks of `window` queries meet the keys of their own
    block and of both neighbours.

    Attributes:
        window: frames to each side.

    Raises:
        InputError: the window is below 1, or num_heads does not divide the width.
    """

    def __init__(
        self,
        d: int,
        num_heads: int,
        window: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        if window < 1:
            raise InputError(
                f"SlidingWindowAttention window is {window}; it must be at least 1 frame"
            )
        super().__init__(d, num_heads, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.window = window

    @classmethod
    def from_attention(
        cls, attention: SelfAttention, window: int, *, rngs: nnx.Rngs
    ) -> "SlidingWindowAttention":
        """The same attention, seen through a window: all four projections copied."""
        like = attention.v_proj
        mixer = cls(
            like.in_features,
            attention.num_heads,
            window,
            rngs=rngs,
            dtype=like.dtype,
            param_dtype=like.param_dtype,
        )
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(mixer, name, copy_module(getattr(attention, name)))
        return mixer

    def attend(self, q: Array, k: Array, v: Array, mask: Mask) -> Float[Array, "b n h c"]:
        """Banded attention, `[b n h c] -> [b n h c]`."""
        return banded_attention(q, k, v, mask, self.window)


def banded_attention(
    q: Float[Array, "b n h c"],
    k: Float[Array, "b n h c"],
    v: Float[Array, "b n h c"],
    mask: Mask,
    window: int,
) -> Float[Array, "b n h c"]:
    """Attention over keys at most `window` frames away, softmax in float32.

    Equal to `attention_reference` with the banded mask on every query that sees a key. One that
    sees none, which only padding can be, gets a finite value without meaning.
    """
    b, n, h, c = q.shape
    size = min(window, n)  # of a block; one block is enough where the window exceeds the signal
    num_blocks = -(-n // size)

    def blocks(a: Array, before: int, after: int) -> Array:
        """`[b n ...] -> [b blocks size ...]`, with empty blocks before and after."""
        fill = (before * size, (num_blocks + after) * size - n)
        a = jnp.pad(a, ((0, 0), fill) + ((0, 0),) * (a.ndim - 2))
        return a.reshape(b, num_blocks + before + after, size, *a.shape[2:])

    def neighbours(a: Array) -> Array:
        """`[b n ...] -> [b blocks 3*size ...]`: each block with the one on either side."""
        a = blocks(a, 1, 1)
        return jnp.concatenate([a[:, :-2], a[:, 1:-1], a[:, 2:]], axis=2)

    query = jnp.arange(size)[:, None]
    key = jnp.arange(3 * size)[None, :] - size
    visible = (jnp.abs(query - key) <= window) & neighbours(mask)[:, :, None, :]
    logits = jnp.einsum(
        "bgqhc,bgkhc->bghqk", blocks(q, 0, 0), neighbours(k), preferred_element_type=jnp.float32
    )
    logits = jnp.where(visible[:, :, None], logits * c**-0.5, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    y = jnp.einsum("bghqk,bgkhc->bgqhc", weights, neighbours(v))
    return y.reshape(b, num_blocks * size, h, c)[:, :n]
