"""The Conformer layer that runs whole, or in steps of a few frames."""

from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.typing import DTypeLike

from edgespeech.nn.causal_conv import StreamingConvolution
from edgespeech.nn.chunk_attention import ChunkAttention, Chunks
from edgespeech.nn.conformer import ConformerFeedForward, LayerNormKind, layer_norm
from edgespeech.nn.remat import rematerialisable
from edgespeech.ops.dropout import dropout
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Frames, Lengths


class LayerState(NamedTuple):
    """What the next frames need of those before.

    Attributes:
        mixer: the mixer's own.
        conv: of the `StreamingConvolution`.
    """

    mixer: Any
    conv: Frames


class StreamingConformerLayer(nnx.Module):
    """`ConformerLayer`, of parts that stream.

        x = x + 1/2 FFN_1(x)
        x = x + mixer(LN(x))
        x = x + Conv(x)
        y = LN(x + 1/2 FFN_2(x))

    Args:
        mixer: the token mixer, `(x, lengths)`, which streams: see `chunk_attention.ChunkAttention`.
        conv: the convolution module.
        ffn_width: width of the feed-forward networks.
        dropout_rate: in training.
        norm: of all layer norms: see `layer_norm`.
        dtype: of the computation; None: that of the input.
        rngs: random streams of Flax.

    Attributes:
        mixer: the slot; assign any streaming mixer to it.
        stride, chunk, latency, receptive_field: of the stream, in frames: see `StreamingConvolution`.
    """

    stride = 1

    def __init__(
        self,
        d: int,
        mixer: Any,
        conv: StreamingConvolution,
        *,
        ffn_width: int,
        dropout_rate: float,
        norm: LayerNormKind = "layer",
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        def feed_forward():
            return ConformerFeedForward(
                d, ffn_width, dropout_rate, norm=norm, dtype=dtype, rngs=rngs
            )

        self.ffn1 = feed_forward()
        self.mixer_norm = layer_norm(d, rngs, norm, dtype)
        self.mixer = nnx.data(mixer)
        self.conv = conv
        self.ffn2 = feed_forward()
        self.norm = layer_norm(d, rngs, norm, dtype)
        self.dropout_rate = dropout_rate

    @property
    def chunk(self) -> int:
        """Frames: the larger one of mixer and convolution, which have the same or 1."""
        return max(getattr(self.mixer, "chunk", 1), self.conv.chunk)

    @property
    def latency(self) -> int:
        """Frames: those of mixer and convolution end with the same chunk."""
        return self.chunk - 1

    @property
    def receptive_field(self) -> tuple[int | None, int]:
        """Frames before and after."""
        past, future = self.conv.receptive_field
        if isinstance(self.mixer, ChunkAttention):
            size, left = self.mixer.chunk, self.mixer.left
            # From frame i the convolution reaches i - past, and attention from there the start of a chunk.
            return max(i - ((i - past) // size - left) * size for i in range(size)), self.latency
        before, after = self.mixer.receptive_field
        return None if before is None else before + past, after + future

    @rematerialisable
    def __call__(
        self, x: Frames, lengths: Lengths, chunks: Chunks | None = None, key: Array | None = None
    ) -> Frames:
        """`[b n d], [b] -> [b n d]`.

        Args:
            x: frame 0 starts a chunk.
            lengths: valid frames.
            chunks: what is seen, in place of the parts' attributes; may be traced. Only attention sees by chunks; other
                mixers are causal.
            key: dropout only when it is given.
        """
        keys = (None,) * 4 if key is None else tuple(jax.random.split(key, 4))
        # Cleared at once: a NaN in the padding would reach the gradients of the norms' scales.
        x = zero_padding(x, mask_from_lengths(lengths, x.shape[1]))
        x = x + 0.5 * self.ffn1(x, keys[0])
        y = self.mixer_norm(x)
        if isinstance(self.mixer, ChunkAttention):
            y = self.mixer(y, lengths, chunks)
        else:
            y = self.mixer(y, lengths)
        x = x + dropout(y, self.dropout_rate, keys[1])
        x = x + self.conv(x, lengths, None if chunks is None else chunks.size, keys[2])
        x = x + 0.5 * self.ffn2(x, keys[3])
        return self.norm(x)

    def init_state(self, batch: int) -> LayerState:
        """No past yet, for so many streams."""
        return LayerState(self.mixer.init_state(batch), self.conv.init_state(batch))

    def step(
        self, chunk: Frames, lengths: Lengths, state: LayerState
    ) -> tuple[Frames, Lengths, LayerState]:
        """The next frames of every stream, `[b c d], [b] -> [b c d], [b]`, and the state after them.

        Raises:
            InputError: c is not a multiple of the attribute `chunk`.
        """
        x = zero_padding(chunk, mask_from_lengths(lengths, chunk.shape[1]))
        x = x + 0.5 * self.ffn1(x)
        y, _, mixer = self.mixer.step(self.mixer_norm(x), lengths, state.mixer)
        x = x + y
        y, _, conv = self.conv.step(x, lengths, state.conv)
        x = x + y
        x = x + 0.5 * self.ffn2(x)
        return self.norm(x), lengths, LayerState(mixer, conv)
