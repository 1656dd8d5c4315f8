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
from edgespeech.nn.rotary import RotarySelfAttention
from edgespeech.ops.attention import MASKED
from edgespeech.ops.mask import mask_from_lengths, zero_padding
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
        _require_window(self, window)
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
        _copy_projections(mixer, attention)
        return mixer

    def attend(self, q: Array, k: Array, v: Array, mask: Mask) -> Float[Array, "b n h c"]:
        """Banded attention, `[b n h c] -> [b n h c]`."""
        return banded_attention(q, k, v, mask, self.window)


class RotarySlidingWindowAttention(RotarySelfAttention):
    """`SlidingWindowAttention` with rotary positions and without biases: what it makes of `RotarySelfAttention`.

    Attributes:
        window: frames to each side.

    Raises:
        InputError: the window is below 1, or see `RotarySelfAttention`.
    """

    def __init__(self, d: int, num_heads: int, rotary_width: int, window: int, *, rngs: nnx.Rngs):
        _require_window(self, window)
        super().__init__(d, num_heads, rotary_width, rngs=rngs)
        self.window = window

    @classmethod
    def from_attention(
        cls, attention: RotarySelfAttention, window: int, *, rngs: nnx.Rngs
    ) -> "RotarySlidingWindowAttention":
        """The same attention, seen through a window: all four projections copied, positions kept."""
        d = attention.v_proj.in_features
        mixer = cls(d, attention.num_heads, attention.rotary_width, window, rngs=rngs)
        _copy_projections(mixer, attention)
        return mixer

    def __call__(self, x: Frames, lengths: Lengths) -> Frames:
        """`[b n d], [b] -> [b n d]`; what lies beyond a length is never seen."""
        mask = mask_from_lengths(lengths, x.shape[1])
        q, (k, v) = self._project(zero_padding(x, mask), jnp.arange(x.shape[1]))
        return self.out_proj(banded_attention(q, k, v, mask, self.window).reshape(x.shape))


WINDOWED = (SlidingWindowAttention, RotarySlidingWindowAttention)


def sliding_window(
    attention: SelfAttention | RotarySelfAttention, window: int, *, rngs: nnx.Rngs
) -> SlidingWindowAttention | RotarySlidingWindowAttention:
    """An attention of either kind, seen through a window of so many frames to each side."""
    if isinstance(attention, RotarySelfAttention):
        return RotarySlidingWindowAttention.from_attention(attention, window, rngs=rngs)
    return SlidingWindowAttention.from_attention(attention, window, rngs=rngs)


def _require_window(mixer: nnx.Module, window: int) -> None:
    if window < 1:
        raise InputError(f"{type(mixer).__name__} window is {window}; it must be at least 1 frame")


def _copy_projections(mixer: nnx.Module, attention: nnx.Module) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(mixer, name, copy_module(getattr(attention, name)))


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
