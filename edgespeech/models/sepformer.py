"""SepFormer (arXiv 2010.13154): masks from dual-path transformers on a learned filter bank.

One speaker is enhancement, two are separation. The layout is SpeechBrain's recipe; see
`interop.speechbrain_sepformer` for what differs.
"""

import dataclasses
from typing import NamedTuple, overload

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.dual_path import (
    Chunks,
    DualPathBlock,
    join_chunks,
    overlap_add,
    split_chunks,
    utterance_norm,
)
from edgespeech.ops.conv import conv1d
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Audio, Float, Frames, Lengths


@dataclasses.dataclass(frozen=True)
class SepFormerConfig:
    """Sizes of the model; the defaults are SpeechBrain's WHAM! enhancement recipe.

    Attributes:
        num_speakers: estimates that come out: 1 for enhancement, 2 for separation.
        sample_rate: Hz of the audio that the model is for.
        num_filters: filters of encoder and decoder. What they cannot hold of a frame is lost before any mask: after
            the rectifier that takes at least two for every sample of the stride.
        width: width of the transformers; SpeechBrain's `out_channels`.
        kernel_size: samples of a filter; the stride is half of it.
        chunk_length: frames of a chunk; chunks overlap by half.
        num_blocks: dual-path blocks.
        num_intra_layers: layers within chunks, in each block.
        num_inter_layers: layers across chunks, in each block.
        num_heads: attention heads; must divide the width.
        ffn_width: width of the feed-forward networks.

    Raises:
        InputError: a value is out of range.
    """

    num_speakers: int = 1
    sample_rate: int = 8000
    num_filters: int = 256
    width: int = 256
    kernel_size: int = 16
    chunk_length: int = 250
    num_blocks: int = 2
    num_intra_layers: int = 8
    num_inter_layers: int = 8
    num_heads: int = 8
    ffn_width: int = 1024

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(
                    f"model.{field.name} is {getattr(self, field.name)}: it must be at least 1"
                )
        if self.num_speakers > 2:
            raise InputError(
                f"model.num_speakers is {self.num_speakers}: choose 1 (enhancement) or 2"
            )
        for name in ("width", "kernel_size", "chunk_length"):
            if getattr(self, name) % 2:
                raise InputError(f"model.{name} is {getattr(self, name)}: it must be even")
        if self.width % self.num_heads:
            raise InputError(
                f"model.num_heads is {self.num_heads}, which does not divide model.width {self.width}: "
                "change either one"
            )

    @classmethod
    def wham(cls) -> "SepFormerConfig":
        """The published enhancement model at 8 kHz: a mask network of 25,605,377 parameters."""
        return cls()

    @classmethod
    def tiny(cls) -> "SepFormerConfig":
        """The same 16 intra-chunk layers for two CPU cores, at 16 kHz, a frame every 4 ms (ours)."""
        return cls(
            sample_rate=16_000,
            num_filters=256,
            width=64,
            kernel_size=128,
            chunk_length=50,
            num_inter_layers=1,
            num_heads=4,
            ffn_width=128,
        )

    @property
    def stride(self) -> int:
        """Samples from one frame to the next."""
        return self.kernel_size // 2

    @overload
    def num_frames(self, lengths: int) -> int: ...
    @overload
    def num_frames(self, lengths: Array) -> Array: ...
    def num_frames(self, lengths):
        """Frames of so many samples, at least one, the last completed with zeros; integers or integer arrays."""
        frames = -(-lengths // self.stride) - 1
        return max(1, frames) if isinstance(lengths, int) else jnp.maximum(1, frames)


class SepFormerOutput(NamedTuple):
    """What a `SepFormer` returns.

    Attributes:
        estimates: `[b spk t]`, zeros beyond a length. SI-SNR, as a loss, leaves their level free.
        masks: `[b spk n f]`, not negative.
        lengths: `[b]`, valid frames of the masks.
        hidden: the output `[b*s k d]` of every intra-chunk layer, in order.
    """

    estimates: Float[Array, "b spk t"]
    masks: Float[Array, "b spk n f"]
    lengths: Lengths
    hidden: tuple[Frames, ...]


class MaskNetwork(nnx.Module):
    """Masks for the filter bank's output.

        c = split(W norm(h));  c = blocks(c);  o_j = overlap_add(W_j PReLU(c) + b_j)
        mask_j = relu(W_e (tanh(W_o o_j + b_o) sigmoid(W_g o_j + b_g)))

    (arXiv 2010.13154, figures 1 and 2; the gate is SpeechBrain's.)

    Attributes:
        blocks: `DualPathBlock`s; `blocks[i].intra.layers[j].mixer` is the slot of an intra-chunk layer.
        scan_layers: compile equal neighbours once; see `run_layers`. Off at first: training turns it on.
    """

    def __init__(self, config: SepFormerConfig, *, rngs: nnx.Rngs):
        d, filters = config.width, config.num_filters
        self.config = config
        self.scan_layers = False
        self.norm = utterance_norm(filters)
        self.bottleneck = nnx.Linear(filters, d, use_bias=False, rngs=rngs)
        self.blocks = nnx.List(
            DualPathBlock(
                d,
                num_intra_layers=config.num_intra_layers,
                num_inter_layers=config.num_inter_layers,
                num_heads=config.num_heads,
                ffn_width=config.ffn_width,
                rngs=rngs,
            )
            for _ in range(config.num_blocks)
        )
        self.slope = nnx.Param(jnp.full(1, 0.25))  # of the PReLU, PyTorch's start
        self.speakers = nnx.Linear(d, d * config.num_speakers, rngs=rngs)
        self.output = nnx.Linear(d, d, rngs=rngs)
        self.gate = nnx.Linear(d, d, rngs=rngs)
        self.expand = nnx.Linear(d, filters, use_bias=False, rngs=rngs)

    def __call__(
        self, h: Frames, lengths: Lengths
    ) -> tuple[Float[Array, "b spk n f"], tuple[Frames, ...]]:
        """`[b n f], [b] ->` masks `[b spk n f]` and the outputs of the intra-chunk layers."""
        x, num_chunks = self.split(h, lengths)
        hidden: tuple[Frames, ...] = ()
        for block in self.blocks:
            x, layers = block(x, num_chunks, scan=self.scan_layers)
            hidden += layers
        return self.masks(x, h.shape[1]), hidden

    def split(self, h: Frames, lengths: Lengths) -> tuple[Chunks, Lengths]:
        """The input `[b s k d]` of the first block, and the valid chunks `[b]`."""
        x = self.bottleneck(self.norm(h, mask_from_lengths(lengths, h.shape[1])))
        return split_chunks(x, lengths, self.config.chunk_length)

    def masks(self, chunks: Chunks, n: int) -> Float[Array, "b spk n f"]:
        """Masks of n frames from the last block's output."""
        b, d = len(chunks), self.config.width
        x = self.speakers(jnp.where(chunks >= 0, chunks, self.slope[...] * chunks))
        x = join_chunks(x, n).reshape(b, n, self.config.num_speakers, d).swapaxes(1, 2)
        x = jnp.tanh(self.output(x)) * jax.nn.sigmoid(self.gate(x))
        return jax.nn.relu(self.expand(x))


class SepFormer(nnx.Module):
    """Encoder, mask network, decoder.

        h = relu(conv(x));  estimate_j = convT(mask_j h)

    Attributes:
        encoder: filters `[kernel_size 1 f]` of the convolution, without bias.
        mask_network: `MaskNetwork`.
        decoder: filters `[kernel_size 1 f]` of the transposed convolution, without bias.
    """

    def __init__(self, config: SepFormerConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.lecun_normal()
        self.encoder = nnx.Param(init(rngs.params(), (config.kernel_size, 1, config.num_filters)))
        self.mask_network = MaskNetwork(config, rngs=rngs)
        init = nnx.initializers.lecun_normal(in_axis=-1, out_axis=0)
        self.decoder = nnx.Param(init(rngs.params(), (config.kernel_size, 1, config.num_filters)))

    def __call__(self, audio: Audio, audio_lengths: Lengths) -> SepFormerOutput:
        """Noisy audio, or a mixture of voices, to estimates of each.

        Args:
            audio: `[b t]`, float32 in [-1, 1], at the configuration's sample rate.
            audio_lengths: `[b]`, valid samples; an utterance's output does not depend on what is beyond.

        Raises:
            InputError: the batch has no samples.
        """
        if audio.shape[1] == 0:
            raise InputError(
                f"audio of shape [{audio.shape[0]}, 0] has no samples: leave empty files out"
            )
        h, lengths = self.encode(audio, audio_lengths)
        masks, hidden = self.mask_network(h, lengths)
        return SepFormerOutput(self.decode(masks, h, audio, audio_lengths), masks, lengths, hidden)

    def encode(self, audio: Audio, audio_lengths: Lengths) -> tuple[Frames, Lengths]:
        """`relu(conv(x))`: `[b t], [b] -> [b n f], [b]`."""
        t, kernel_size, stride = audio.shape[1], self.config.kernel_size, self.config.stride
        n, lengths = self.config.num_frames(t), self.config.num_frames(audio_lengths)
        mask = mask_from_lengths(audio_lengths, t)
        x = jnp.pad(jnp.where(mask, audio, 0.0), ((0, 0), (0, (n - 1) * stride + kernel_size - t)))
        h = jax.nn.relu(conv1d(x[..., None], self.encoder[...], stride))
        return zero_padding(h, mask_from_lengths(lengths, n)), lengths

    def decode(
        self,
        masks: Float[Array, "b spk n f"],
        h: Frames,
        audio: Audio,
        audio_lengths: Lengths,
    ) -> Float[Array, "b spk t"]:
        """`convT(mask_j h)`, cut to the extent of the audio and zero beyond its lengths."""
        b, t = audio.shape
        # A transposed convolution whose stride is half its kernel is an overlap-add of frames.
        frames = (masks * h[:, None]) @ self.decoder[:, 0].T.astype(h.dtype)
        frames = frames.reshape(-1, h.shape[1], self.config.kernel_size, 1)
        estimates = overlap_add(frames).reshape(b, self.config.num_speakers, -1)[..., :t]
        return jnp.where(mask_from_lengths(audio_lengths, t)[:, None], estimates, 0.0)
