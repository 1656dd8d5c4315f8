"""Dual-path processing: half-overlapping chunks, and transformers along and across them.

Luo et al., "Dual-path RNN" (arXiv 1910.06379, section 2) for chunks and overlap-add; Subakan et al., "Attention is all
you need in speech separation" (arXiv 2010.13154, section 2.2) for the transformers. Where the papers are silent
(norms, skips, padding) this follows SpeechBrain's implementation, so that its weights can be used.

Letters beside those of the legend: `k` positions of a chunk, `s` chunks of an utterance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.masked_norm import MaskedNorm
from edgespeech.nn.transformer import EncoderLayer, FeedForward, run_layers
from edgespeech.ops.dropout import dropout
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Float, Frames, Lengths

Chunks = Float[Array, "b s k d"]


def chunk_count(lengths, k: int):
    """Chunks of so many frames: `2 (floor((n + k/2) / k) + 1)`, on integers or integer arrays.

    Half a chunk of zeros goes before the frames and at least half a one behind them, so that two chunks see every
    frame. The count is SpeechBrain's: always even, with up to one chunk more of zeros than needed.
    """
    return 2 * ((lengths + k // 2) // k + 1)


def split_chunks(x: Frames, lengths: Lengths, k: int) -> tuple[Chunks, Lengths]:
    """Cuts `[b n d]` into chunks of k frames that overlap by half, `C_s = x[(s-1) k/2 : (s+1) k/2]`.

    Args:
        x: frames; what lies beyond a length counts as zero.
        lengths: `[b]`, valid frames.
        k: frames of a chunk.

    Returns:
        `[b s k d]`, and how many of the s chunks each utterance has: as many as alone, whatever the batch.

    Raises:
        InputError: k is odd.
    """
    if k < 2 or k % 2:
        raise InputError(
            f"chunks of {k} frames cannot overlap by half: choose an even number from 2"
        )
    b, n, d = x.shape
    x = zero_padding(x, mask_from_lengths(lengths, n))
    count, half = chunk_count(n, k), k // 2
    x = jnp.pad(x, ((0, 0), (half, count * half - n), (0, 0)))
    halves = x.reshape(b, count + 1, half, d)
    return jnp.concatenate([halves[:, :-1], halves[:, 1:]], axis=2), chunk_count(lengths, k)


def overlap_add(chunks: Chunks) -> Frames:
    """Sums half-overlapping chunks at their places, `[b s k d] -> [b (s+1)k/2 d]`."""
    b, s, k, d = chunks.shape
    first, second = chunks[:, :, : k // 2], chunks[:, :, k // 2 :]
    edge = jnp.zeros((b, 1, k // 2, d), chunks.dtype)
    halves = jnp.concatenate([first, edge], 1) + jnp.concatenate([edge, second], 1)
    return halves.reshape(b, (s + 1) * k // 2, d)


def join_chunks(chunks: Chunks, n: int) -> Frames:
    """Overlap-add without the half chunk in front: n frames, `join_chunks(split_chunks(x)) = 2 x`."""
    half = chunks.shape[2] // 2
    return overlap_add(chunks)[:, half : half + n]


def sinusoidal_positions(n: int, d: int) -> Float[Array, "n d"]:
    """`P[i, 2j] = sin(i / 10000^(2j/d))`, `P[i, 2j+1] = cos(same)` (Vaswani et al., 2017, section 3.5), float32."""
    angles = jnp.arange(n)[:, None] * jnp.exp(-jnp.log(10000.0) * jnp.arange(0, d, 2) / d)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(n, d)


def utterance_norm(d: int) -> MaskedNorm:
    """One mean and one variance an utterance, epsilon 1e-8, as in SpeechBrain's SepFormer."""
    return MaskedNorm(d, "group", epsilon=1e-8)


class ReLUFeedForward(FeedForward):
    """`W_2 relu(W_1 x)`."""

    def __call__(self, x: Frames, key: Array | None = None) -> Frames:
        """`[b n d] -> [b n d]`."""
        return self.contract(dropout(jax.nn.relu(self.expand(x)), self.dropout_rate, key))


class DualPathLayer(EncoderLayer):
    """`x = x + mixer(LN(x)); x = x + ffn(LN(x))` with ReLU and a layer-norm epsilon of 1e-6; no dropout.

    Attributes:
        mixer: the slot; assign any module with the mixer call to it.
    """

    def __init__(self, d: int, num_heads: int, ffn_width: int, *, rngs: nnx.Rngs):
        super().__init__(d, num_heads, ffn_width, norm_first=True, dropout_rate=0.0, rngs=rngs)
        self.ffn = ReLUFeedForward(d, ffn_width, 0.0, rngs=rngs)
        self.mixer_norm.epsilon = self.ffn_norm.epsilon = 1e-6


class PathTransformer(nnx.Module):
    """`LN(layers(x + positions))`: the transformer along chunks, or across them.

    Attributes:
        layers: `DualPathLayer`s; `layers[i].mixer` is the slot for attention or what replaces it.
    """

    def __init__(self, d: int, num_layers: int, num_heads: int, ffn_width: int, *, rngs: nnx.Rngs):
        self.layers = nnx.List(
            DualPathLayer(d, num_heads, ffn_width, rngs=rngs) for _ in range(num_layers)
        )
        self.norm = nnx.LayerNorm(d, epsilon=1e-6, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: Frames, lengths: Lengths, *, scan: bool) -> tuple[Frames, ...]:
        """`[b n d], [b] ->` the output of every layer, and at the end the normalised last one.

        `scan`: compile equal neighbours once; see `run_layers`.
        """
        x = x + sinusoidal_positions(*x.shape[1:])
        hidden = run_layers(self.layers, x, lengths, (None,) * len(self.layers), scan=scan)
        return (*hidden, self.norm(hidden[-1]))


class DualPathOutput(NamedTuple):
    """What a `DualPathBlock` returns.

    Attributes:
        chunks: `[b s k d]`, zeros where a chunk is padding.
        hidden: the output `[b*s k d]` of every intra-chunk layer, in order.
    """

    chunks: Chunks
    hidden: tuple[Frames, ...]


class DualPathBlock(nnx.Module):
    """A transformer within chunks, then one across them, for all chunks and positions with the same weights.

        y = x + norm(intra(x));  z = y + norm(inter(y))

    intra sees the k positions of one chunk, inter the same position of all s chunks of an utterance. A chunk is valid
    as a whole: the zeros in front of the first frame and behind the last one are positions like others, as in
    SpeechBrain's. A chunk that only the batch adds has length 0 for the mixers.

    Attributes:
        intra, inter: `PathTransformer`s.
        intra_norm, inter_norm: see `utterance_norm`.
    """

    def __init__(
        self,
        d: int,
        *,
        num_intra_layers: int,
        num_inter_layers: int,
        num_heads: int,
        ffn_width: int,
        rngs: nnx.Rngs,
    ):
        self.intra = PathTransformer(d, num_intra_layers, num_heads, ffn_width, rngs=rngs)
        self.intra_norm = utterance_norm(d)
        self.inter = PathTransformer(d, num_inter_layers, num_heads, ffn_width, rngs=rngs)
        self.inter_norm = utterance_norm(d)

    def __call__(self, x: Chunks, num_chunks: Lengths, *, scan: bool) -> DualPathOutput:
        """`[b s k d], [b] -> [b s k d]`; `num_chunks` are the valid ones, `scan` as in `PathTransformer`."""
        b, s, k, d = x.shape
        mask = mask_from_lengths(num_chunks, s)
        x = jnp.where(mask[:, :, None, None], x, 0.0)
        intra_lengths = jnp.where(mask, k, 0).reshape(b * s)
        *hidden, y = self.intra(x.reshape(b * s, k, d), intra_lengths, scan=scan)
        y = x + self.intra_norm(y.reshape(b, s, k, d), mask)
        across = y.swapaxes(1, 2).reshape(b * k, s, d)
        z = self.inter(across, jnp.repeat(num_chunks, k), scan=scan)[-1]
        z = y + self.inter_norm(z.reshape(b, k, s, d).swapaxes(1, 2), mask)
        return DualPathOutput(z, tuple(hidden))
