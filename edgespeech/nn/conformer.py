"""The Conformer layer (Gulati et al., 2020, arXiv 2005.08100), exact under padding."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from edgespeech.errors import InputError
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.masked_norm import MaskedNorm, NormKind
from edgespeech.nn.norm import LpLayerNorm
from edgespeech.nn.relative_attention import RelativeSelfAttention, sinusoids
from edgespeech.nn.remat import rematerialisable
from edgespeech.nn.transformer import Mixer
from edgespeech.ops.conv import depthwise_conv
from edgespeech.ops.dropout import dropout
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Frames, Lengths, Mask

Positions = Literal["absolute", "relative"]
LayerNormKind = Literal["layer", "lp"]


def layer_norm(
    d: int, rngs: nnx.Rngs, kind: LayerNormKind = "layer", dtype: DTypeLike | None = None
) -> nnx.LayerNorm | LpLayerNorm:
    """Layer norm over the channels, epsilon 1e-5, variance from centred values.

    Args:
        d: channels.
        rngs: random streams of Flax; nothing is drawn.
        kind: `layer`: statistics in float32. `lp`: all of it in `dtype`, with the MAD pre-normaliser (`LpLayerNorm`).
        dtype: of the result; None: that of the input.

    Raises:
        InputError: the kind is neither.
    """
    if kind == "lp":
        return LpLayerNorm(d, epsilon=1e-5, dtype=dtype)
    if kind != "layer":
        raise InputError(f"norm is {kind!r}: choose {', '.join(get_args(LayerNormKind))}")
    return nnx.LayerNorm(d, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)


def linear(d_in: int, d_out: int, rngs: nnx.Rngs, dtype: DTypeLike | None = None) -> nnx.Linear:
    """Linear layer with bias, Xavier initialisation (that of the early-exit papers' training)."""
    init = nnx.initializers.xavier_uniform()
    return nnx.Linear(d_in, d_out, kernel_init=init, dtype=dtype, rngs=rngs)


def add_sinusoids(x: Frames) -> Frames:
    """`x_i + sinusoid(i)`, frames counted from 0 (Vaswani et al., 2017); x is not scaled."""
    return x + sinusoids(jnp.arange(x.shape[1]), x.shape[2]).astype(x.dtype)


class ConformerFeedForward(nnx.Module):
    """`W_2 silu(W_1 LN(x))`, dropout after the activation and at the end (Conformer, section 2.3).

    `norm` and `dtype` are those of `layer_norm`.
    """

    def __init__(
        self,
        d: int,
        width: int,
        dropout_rate: float,
        *,
        norm: LayerNormKind = "layer",
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.norm = layer_norm(d, rngs, norm, dtype)
        self.expand = linear(d, width, rngs, dtype)
        self.contract = linear(width, d, rngs, dtype)
        self.dropout_rate = dropout_rate

    def __call__(self, x: Frames, key: Array | None = None) -> Frames:
        """`[b n d] -> [b n d]`; dropout only when a key is given."""
        inner_key, outer_key = (None, None) if key is None else jax.random.split(key)
        y = dropout(jax.nn.silu(self.expand(self.norm(x))), self.dropout_rate, inner_key)
        return dropout(self.contract(y), self.dropout_rate, outer_key)


class ConvolutionModule(nnx.Module):
    """`W_2 silu(norm(DWConv_k(glu(W_1 LN(x)))))` (Conformer, section 2.2), `glu(a, b) = a sigmoid(b)`.

    Padding counts as zero in the depthwise convolution and not at all in the norm.

    Attributes:
        depthwise: `[k d]`, tap 0 meets the oldest frame; `depthwise_bias`: `[d]`.
        middle_norm: batch norm in the paper; group or layer norm on request.

    Raises:
        InputError: the kernel size is even: its taps could not be centred.
    """

    def __init__(
        self, d: int, kernel_size: int, dropout_rate: float, norm: NormKind, *, rngs: nnx.Rngs
    ):
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise InputError(
                f"kernel_size of the convolution module is {kernel_size}: it must be odd, to be centred on a frame"
            )
        self.norm = layer_norm(d, rngs)
        self.expand = linear(d, 2 * d, rngs)
        init = nnx.initializers.normal(kernel_size**-0.5)
        self.depthwise = nnx.Param(init(rngs.params(), (kernel_size, d)))
        self.depthwise_bias = nnx.Param(jnp.zeros(d))
        self.middle_norm = MaskedNorm(d, norm)
        self.contract = linear(d, d, rngs)
        self.dropout_rate = dropout_rate

    def __call__(self, x: Frames, mask: Mask, key: Array | None = None) -> Frames:
        """`[b n d], [b n] -> [b n d]`; a key means training: dropout, and batch statistics in a batch norm."""
        value, gate = jnp.split(self.expand(self.norm(x)), 2, axis=-1)
        y = depthwise_conv(value * jax.nn.sigmoid(gate), self.depthwise[...], mask)
        y = self.middle_norm(y + self.depthwise_bias[...], mask, training=key is not None)
        return dropout(self.contract(jax.nn.silu(y)), self.dropout_rate, key)


class ConformerLayer(nnx.Module):
    """Self-attention and convolution between two half-step feed-forward networks (Conformer, equation 1).

        x = x + 1/2 FFN_1(x)
        x = x + mixer(LN(x))
        x = x + Conv(x)
        y = LN(x + 1/2 FFN_2(x))

    Attributes:
        mixer: the slot; assign any module with the mixer call to it.
        norm: the last layer norm.

    Args:
        d: width.
        num_heads: heads of the attention that stands in the slot at first.
        ffn_width: width of the feed-forward networks.
        kernel_size: taps of the depthwise convolution, odd.
        dropout_rate: in training.
        conv_norm: norm inside the convolution module.
        positions: `relative`: the attention sees offsets (the Conformer paper). `absolute`: it sees none, positions
            are added to the input once (the early-exit papers).
    """

    def __init__(
        self,
        d: int,
        num_heads: int,
        ffn_width: int,
        kernel_size: int,
        *,
        dropout_rate: float,
        conv_norm: NormKind = "batch",
        positions: Positions = "absolute",
        rngs: nnx.Rngs,
    ):
        if positions not in get_args(Positions):
            raise InputError(f"positions is {positions!r}: choose {', '.join(get_args(Positions))}")
        attention = RelativeSelfAttention if positions == "relative" else SelfAttention
        self.ffn1 = ConformerFeedForward(d, ffn_width, dropout_rate, rngs=rngs)
        self.mixer_norm = layer_norm(d, rngs)
        # Held as data: the slot may become a module without arrays, and the graph must not change its kind.
        self.mixer: Mixer = nnx.data(attention(d, num_heads, rngs=rngs))
        self.conv = ConvolutionModule(d, kernel_size, dropout_rate, conv_norm, rngs=rngs)
        self.ffn2 = ConformerFeedForward(d, ffn_width, dropout_rate, rngs=rngs)
        self.norm = layer_norm(d, rngs)
        self.dropout_rate = dropout_rate

    @rematerialisable
    def __call__(self, x: Frames, lengths: Lengths, key: Array | None = None) -> Frames:
        """`[b n d], [b] -> [b n d]`; a key means training: dropout, and batch statistics in a batch norm."""
        keys = (None,) * 4 if key is None else tuple(jax.random.split(key, 4))
        mask = mask_from_lengths(lengths, x.shape[1])
        # Cleared at once: a NaN in the padding would reach the gradients of the norms' scales.
        x = zero_padding(x, mask)
        x = x + 0.5 * self.ffn1(x, keys[0])
        x = x + dropout(self.mixer(self.mixer_norm(x), lengths), self.dropout_rate, keys[1])
        x = x + self.conv(x, mask, keys[2])
        x = x + 0.5 * self.ffn2(x, keys[3])
        return self.norm(x)
