"""Attention and feed-forward in the layout of neural accelerators: (B, C, 1, S), channels ahead of time.

Three principles (arXiv 2312.10359, figure 1; Apple's public ane-transformers code): transpose the input to (B, C, 1, S)
once and the output back once; split into small tensors, by head and by chunk, that stay in cache; einsum in place of
batched matrix products. Linear layers are 1x1 convolutions, the last axis is contiguous, and nothing is reshaped in
between. The code is ours.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from edgespeech.errors import InputError
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.transformer import FeedForward
from edgespeech.ops.mask import mask_from_lengths
from edgespeech.types import Array, Bool, Float, Frames, Lengths

# Added to the logits of hidden keys: exp(-1e4) is 0 in every format, and several such terms still add up in float16.
MASKED = -1e4


def to_channels_first(x: Frames) -> Float[Array, "b d 1 n"]:
    """`[b n d] -> [b d 1 n]`."""
    return lax.expand_dims(jnp.swapaxes(x, 1, 2), (2,))


def from_channels_first(x: Float[Array, "b d 1 n"]) -> Frames:
    """`[b d 1 n] -> [b n d]`."""
    return jnp.swapaxes(lax.squeeze(x, (2,)), 1, 2)


class PointwiseConv(nnx.Module):
    """A linear layer as a 1x1 convolution.

    Attributes:
        kernel: `[e d 1 1]`.
        bias: `[e 1 1]`.
    """

    def __init__(self, linear: nnx.Linear):
        self.kernel = nnx.Param(lax.expand_dims(linear.kernel[...].T, (2, 3)))
        bias = jnp.zeros(linear.out_features) if linear.bias is None else linear.bias[...]
        self.bias = nnx.Param(lax.expand_dims(bias, (1, 2)))

    def __call__(self, x: Float[Array, "b d 1 n"]) -> Float[Array, "b e 1 n"]:
        """`y = W x + b` at every position."""
        y = lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(1, 1),
            padding="VALID",
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )
        return y + self.bias[...].astype(x.dtype)


class ChannelsFirstAttention(nnx.Module):
    """`SelfAttention` with the same parameters in (B, C, 1, S): one head and one chunk of queries at a time.

        logits = einsum("bchq,bkhc->bkhq", q, k) c^-1/2 + mask,   y = einsum("bkhq,bchk->bchq", softmax_k(logits), v)

    h is an axis of size 1; the heads are a list.

    Args:
        attention: where the parameters come from; they are copied.
        chunk_size: queries at a time, which bounds the logits in memory to one chunk by n; None: all.

    Raises:
        InputError: chunk_size is less than 1.
    """

    def __init__(self, attention: SelfAttention, *, chunk_size: int | None = None):
        _check_chunk("ChannelsFirstAttention", chunk_size)
        self.num_heads = attention.num_heads
        self.chunk_size = chunk_size
        self.q_proj = PointwiseConv(attention.q_proj)
        self.k_proj = PointwiseConv(attention.k_proj)
        self.v_proj = PointwiseConv(attention.v_proj)
        self.out_proj = PointwiseConv(attention.out_proj)

    def __call__(self, x: Float[Array, "b d 1 n"], lengths: Lengths) -> Float[Array, "b d 1 n"]:
        """`[b d 1 n], [b] -> [b d 1 n]`; what lies beyond a length is never seen."""
        mask = mask_from_lengths(lengths, x.shape[3])
        x = _zero_padding(x, mask)
        bias = jnp.where(lax.expand_dims(mask, (2, 3)), 0.0, MASKED).astype(x.dtype)
        q = jnp.split(self.q_proj(x), self.num_heads, axis=1)
        # k is transposed once for all heads and chunks.
        k = jnp.split(jnp.swapaxes(self.k_proj(x), 1, 3), self.num_heads, axis=3)
        v = jnp.split(self.v_proj(x), self.num_heads, axis=1)
        heads = [self._head(*parts, bias) for parts in zip(q, k, v, strict=True)]
        return self.out_proj(jnp.concatenate(heads, axis=1))

    def _head(self, q, k, v, bias):
        return jnp.concatenate(
            [_attend(part, k, v, bias) for part in _chunks(q, self.chunk_size)], axis=3
        )


def _attend(
    q: Float[Array, "b c 1 q"],
    k: Float[Array, "b k 1 c"],
    v: Float[Array, "b c 1 k"],
    bias: Float[Array, "b k 1 1"],
) -> Float[Array, "b c 1 q"]:
    logits = jnp.einsum("bchq,bkhc->bkhq", q, k) * q.shape[1] ** -0.5 + bias
    weights = jax.nn.softmax(logits, axis=1)
    return jnp.einsum("bkhq,bchk->bchq", weights, v)


class ChannelsFirstFeedForward(nnx.Module):
    """`FeedForward` with the same parameters in (B, C, 1, S), without dropout: one chunk of frames at a time.

    Args:
        ffn: where the parameters come from; they are copied.
        chunk_size: frames at a time, which bounds the widened activations in memory; None: all.

    Raises:
        InputError: chunk_size is less than 1.
    """

    def __init__(self, ffn: FeedForward, *, chunk_size: int | None = None):
        _check_chunk("ChannelsFirstFeedForward", chunk_size)
        self.chunk_size = chunk_size
        self.expand = PointwiseConv(ffn.expand)
        self.contract = PointwiseConv(ffn.contract)

    def __call__(self, x: Float[Array, "b d 1 n"]) -> Float[Array, "b d 1 n"]:
        """`[b d 1 n] -> [b d 1 n]`."""
        parts = [
            self.contract(jax.nn.gelu(self.expand(part), approximate=False))
            for part in _chunks(x, self.chunk_size)
        ]
        return jnp.concatenate(parts, axis=3)


def _check_chunk(name: str, chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"{name} chunk_size is {chunk_size}: it must be at least 1, or None")


def _chunks(x: Float[Array, "b d 1 n"], size: int | None) -> list[Array]:
    n = x.shape[3]
    size = size or max(n, 1)
    return [lax.slice_in_dim(x, i, min(i + size, n), axis=3) for i in range(0, n, size)]


def _zero_padding(x: Float[Array, "b d 1 n"], mask: Bool[Array, "b n"]) -> Array:
    return jnp.where(lax.expand_dims(mask, (1, 2)), x, jnp.zeros((), x.dtype))
