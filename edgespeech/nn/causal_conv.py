"""Depthwise convolution that streams: causal, or with a future that ends at the chunk's end."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from edgespeech.errors import InputError
from edgespeech.nn.conformer import LayerNormKind, layer_norm, linear
from edgespeech.ops.conv import depthwise_conv
from edgespeech.ops.dropout import dropout
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Float, Frames, Int, Lengths

Reach = Literal["causal", "chunk"]


def carry_over(joined: Float[Array, "b k+c ..."], lengths: Lengths, size: int) -> Array:
    """The `size` frames before each stream's next one: what `step` keeps.

    Args:
        joined: the k = `size` frames kept so far, and the new ones after them.
        lengths: how many of the new ones are valid. With 0, what was kept is kept.
        size: k.

    Returns:
        `[b k ...]`.
    """
    index = lengths[:, None] + jnp.arange(size)
    return jnp.take_along_axis(joined, index.reshape(*index.shape, *(1,) * (joined.ndim - 2)), 1)


def whole_chunks(name: str, frames: int, chunk: int) -> None:
    """Checks the length of the array that a `step` gets.

    Raises:
        InputError: it is not a multiple of the chunk.
    """
    if frames % chunk or frames == 0:
        raise InputError(
            f"{name}.step got an array of {frames} frames: pad it to a multiple of {chunk}, lengths unchanged"
        )


def chunk_limited_conv(
    x: Float[Array, "b p+n d"], kernel: Float[Array, "k d"], chunk: int | Int[Array, ""]
) -> Frames:
    """Centred depthwise convolution whose future taps end with the chunk of `chunk` frames.

        y_i = sum_o K_{p+o} x_{p+i+o},   -p <= o <= p,   of o > 0 those with i mod chunk + o < chunk

    The limit is that of dynamic chunk convolution (Li et al., 2023, arXiv 2304.09325).

    Args:
        x: p = (k - 1) / 2 frames of the past, then the n frames to filter, from the start of a chunk on; what is not
            valid is zero.
        kernel: `[k d]`, k odd, tap 0 meets the oldest frame.
        chunk: frames of a chunk, at least 1; may be traced.

    Returns:
        `[b n d]`.
    """
    p = (kernel.shape[0] - 1) // 2
    y = depthwise_conv(x, kernel[: p + 1], causal=True)[:, p:]
    n = y.shape[1]
    place = jnp.arange(n) % chunk
    for o in range(1, min(p, n - 1) + 1):
        ahead = jnp.pad(x[:, p + o :], ((0, 0), (0, o), (0, 0)))
        reached = (place + o < chunk)[:, None]
        y = y + jnp.where(reached, ahead * kernel[p + o].astype(x.dtype), jnp.zeros((), x.dtype))
    return y


class StreamingConvolution(nnx.Module):
    """The Conformer's convolution module, `W_2 silu(LN(DWConv_k(glu(W_1 LN(x)))))`, whole or in steps.

    Layer norm stands where the paper has batch norm (section 2.2): it needs one frame alone, and no statistics that
    leave the range of float16.

    Args:
        d: width.
        kernel_size: k, odd.
        dropout_rate: in training.
        reach: `causal`: the k - 1 frames before. `chunk`: centred, (k - 1) / 2 frames before and as many after as the
            chunk still holds (`chunk_limited_conv`).
        chunk: frames of a chunk; `causal` has none, and streams in pieces of any size.
        norm: of both layer norms: see `layer_norm`.
        dtype: of the computation; None: that of the input.
        rngs: random streams of Flax.

    Attributes:
        depthwise: `[k d]`, tap 0 meets the oldest frame; `depthwise_bias`: `[d]`.
        chunk, stride, latency, receptive_field: of the stream, in frames; `latency` is what is needed beyond the frame
            that comes out, `receptive_field` is (past, future).

    Raises:
        InputError: kernel_size is even, chunk below 1, or reach unknown.
    """

    stride = 1

    def __init__(
        self,
        d: int,
        kernel_size: int,
        dropout_rate: float,
        *,
        reach: Reach,
        chunk: int = 1,
        norm: LayerNormKind = "layer",
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise InputError(
                f"kernel_size of the convolution module is {kernel_size}: it must be odd and at least 1"
            )
        if reach not in get_args(Reach):
            raise InputError(
                f"reach of the convolution is {reach!r}: choose {', '.join(get_args(Reach))}"
            )
        if chunk < 1:
            raise InputError(f"chunk of the convolution module is {chunk}: it must be at least 1")
        self.reach: Reach = reach
        self.chunk = chunk if reach == "chunk" else 1
        self.norm = layer_norm(d, rngs, norm, dtype)
        self.expand = linear(d, 2 * d, rngs, dtype)
        init = nnx.initializers.normal(kernel_size**-0.5)
        self.depthwise = nnx.Param(init(rngs.params(), (kernel_size, d)))
        self.depthwise_bias = nnx.Param(jnp.zeros(d))
        self.middle_norm = layer_norm(d, rngs, norm, dtype)
        self.contract = linear(d, d, rngs, dtype)
        self.dropout_rate = dropout_rate

    @property
    def latency(self) -> int:
        """Frames."""
        return self.chunk - 1

    @property
    def receptive_field(self) -> tuple[int, int]:
        """Frames before and after."""
        return self._past, min(self._past, self.chunk - 1)

    def __call__(
        self,
        x: Frames,
        lengths: Lengths,
        chunk: int | Int[Array, ""] | None = None,
        key: Array | None = None,
    ) -> Frames:
        """`[b n d], [b] -> [b n d]`.

        Args:
            x: chunks are counted from its first frame.
            lengths: what lies beyond counts as zero.
            chunk: in place of the attribute; may be traced. `causal` does not depend on it.
            key: dropout only when it is given.
        """
        x = self._gated(x, lengths)
        x = jnp.pad(x, ((0, 0), (self._past, 0), (0, 0)))
        y = self._project(self._filter(x, self.chunk if chunk is None else chunk))
        return dropout(y, self.dropout_rate, key)

    def init_state(self, batch: int) -> Frames:
        """The frames before the first: zeros `[b p d]`."""
        kernel = self.depthwise[...]
        dtype = self.contract.dtype or kernel.dtype
        return jnp.zeros((batch, self._past, kernel.shape[1]), dtype)

    def step(
        self, chunk: Frames, lengths: Lengths, state: Frames
    ) -> tuple[Frames, Lengths, Frames]:
        """The next frames of every stream, `[b c d], [b] -> [b c d], [b]`, and the state after them.

        Raises:
            InputError: c is not a multiple of the attribute `chunk`.
        """
        whole_chunks("StreamingConvolution", chunk.shape[1], self.chunk)
        joined = jnp.concatenate([state, self._gated(chunk, lengths)], axis=1)
        y = self._project(self._filter(joined, self.chunk))
        return y, lengths, carry_over(joined, lengths, self._past)

    @property
    def _past(self) -> int:
        k = self.depthwise.shape[0]
        return k - 1 if self.reach == "causal" else (k - 1) // 2

    def _gated(self, x: Frames, lengths: Lengths) -> Frames:
        mask = mask_from_lengths(lengths, x.shape[1])
        # Before, for the gradients of the norm, and after, for the bias of the linear layer.
        y = jax.nn.glu(self.expand(self.norm(zero_padding(x, mask))), axis=-1)
        return zero_padding(y, mask)

    def _filter(self, x: Float[Array, "b p+n d"], chunk: int | Array) -> Frames:
        kernel = self.depthwise[...]
        if self.reach == "chunk":
            return chunk_limited_conv(x, kernel, chunk)
        return depthwise_conv(x, kernel, causal=True)[:, self._past :]

    def _project(self, y: Frames) -> Frames:
        y = self.middle_norm(y + self.depthwise_bias[...].astype(y.dtype))
        return self.contract(jax.nn.silu(y))
