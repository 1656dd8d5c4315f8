"""A Conformer layer at a lower frame rate, beside the layers of an exit (Splitformer, arXiv 2506.18035)."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.conformer import ConformerLayer
from edgespeech.types import Array, Float, Frames, Lengths

Downsample = Literal["slice", "mean", "softmax"]
Combine = Literal["sum", "bypass"]

FACTOR = 2


def half_lengths(lengths: Lengths) -> Lengths:
    """`ceil(length / 2)`: valid frames after downsampling."""
    return (lengths + FACTOR - 1) // FACTOR


def slice_frames(x: Frames) -> Frames:
    """`y_k = x_{2k}`, `[b n d] -> [b ceil(n/2) d]` (Splitformer's released code).

    Upstream pads x with zeros to an even length first; the padded frame is never one of those that are kept.
    """
    return x[:, ::FACTOR]


def average_frames(x: Frames, lengths: Lengths, weights: Float[Array, "2"]) -> Frames:
    """`y_k = w_0 x_{2k} + w_1 x_{2k+1}`, `[b n d] -> [b ceil(n/2) d]`.

    An utterance of odd length repeats its own last frame, as Zipformer does (arXiv 2310.11230, section 3.1), so
    that the padding has no part in it.
    """
    n = x.shape[1]
    index = jnp.arange(-(-n // FACTOR) * FACTOR)[None, :]
    index = jnp.clip(jnp.minimum(index, lengths[:, None] - 1), 0, n - 1)
    pairs = jnp.take_along_axis(x, index[..., None], axis=1).reshape(len(x), -1, FACTOR, x.shape[2])
    return jnp.einsum("bkjd,j->bkd", pairs, weights.astype(x.dtype))


def repeat_frames(x: Frames, n: int) -> Frames:
    """`y_i = x_{i // 2}`, `[b ceil(n/2) d] -> [b n d]`."""
    return jnp.repeat(x, FACTOR, axis=1)[:, :n]


class ParallelBranch(nnx.Module):
    """Downsample by 2, one layer, repeat, combine with what the layers beside it gave.

        v = repeat(layer(downsample(u)))
        sum:     y = h + v                       (Splitformer)
        bypass:  y = h + c * (v - h)             c in [0, 1] for every channel, learned (after Zipformer's bypass)

    With the layer's last norm at zero, `sum` gives h. Downsampling is `slice` in Splitformer, and on request `mean`
    (weights 1/2) or `softmax`, Zipformer's `softmax(b)` with b learned and 0 at first.

    Attributes:
        layer: the Conformer layer at half the frame rate.
        weight_logits: b, `[2]`, of `softmax` alone.
        bypass_scale: c, `[d]`, of `bypass` alone; 0.5 at first.

    Raises:
        InputError: downsample or combine is none of those.
    """

    def __init__(
        self,
        layer: ConformerLayer,
        d: int,
        downsample: Downsample = "slice",
        combine: Combine = "sum",
    ):
        for name, value, choices in (
            ("downsample", downsample, get_args(Downsample)),
            ("combine", combine, get_args(Combine)),
        ):
            if value not in choices:
                raise InputError(f"{name} is {value!r}: choose {', '.join(choices)}")
        self.layer = layer
        self.downsample = downsample
        self.combine = combine
        if downsample == "softmax":
            self.weight_logits = nnx.Param(jnp.zeros(FACTOR))
        if combine == "bypass":
            self.bypass_scale = nnx.Param(jnp.full(d, 0.5))

    def __call__(self, u: Frames, h: Frames, lengths: Lengths, key: Array | None = None) -> Frames:
        """The combined frames `[b n d]`.

        Args:
            u: `[b n d]`, input of the layers beside the branch.
            h: `[b n d]`, their output.
            lengths: `[b]`, valid frames of both.
            key: a key means training; see `ConformerLayer`.
        """
        v = self.layer(self.downsampled(u, lengths), half_lengths(lengths), key)
        return self.combined(h, v)

    def combined(self, h: Frames, v: Frames) -> Frames:
        """`[b n d]` of the layers and `[b ceil(n/2) d]` of the branch's layer to what goes on, `[b n d]`."""
        v = repeat_frames(v, h.shape[1])
        if self.combine == "sum":
            return h + v
        return h + jnp.clip(self.bypass_scale[...], 0.0, 1.0) * (v - h)

    def downsampled(self, u: Frames, lengths: Lengths) -> Frames:
        """Input of the branch's layer, `[b n d] -> [b ceil(n/2) d]`."""
        if self.downsample == "slice":
            return slice_frames(u)
        if self.downsample == "mean":
            return average_frames(u, lengths, jnp.full(FACTOR, 1.0 / FACTOR))
        return average_frames(u, lengths, jax.nn.softmax(self.weight_logits[...]))
