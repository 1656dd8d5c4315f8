"""From audio to frames: the convolutional front ends of the wav2vec2 encoder."""

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.ops.conv import conv1d, conv_length, depthwise_conv
from edgespeech.ops.features import (
    HOP,
    WINDOW,
    SpecAugmentConfig,
    feature_lengths,
    log_mel,
    normalize_features,
    spec_augment,
)
from edgespeech.ops.mask import mask_from_lengths, masked_mean, zero_padding
from edgespeech.types import Array, Audio, Frames, Lengths

WAV2VEC2_KERNELS = (10, 3, 3, 3, 3, 2, 2)
WAV2VEC2_STRIDES = (5, 2, 2, 2, 2, 2, 2)
SUBSAMPLING_KERNEL = 3
SUBSAMPLING_STRIDE = 2


class WaveformFrontEnd(nnx.Module):
    """Seven convolutions over the waveform, 320 samples (20 ms) a frame (wav2vec 2.0, arXiv 2006.11477, section 2).

    The waveform is brought to zero mean and unit variance, the first convolution is followed by a group norm of one
    channel a group, which runs over time, and every one by GELU. Statistics are taken over an utterance's own valid
    positions, so its frames are the same alone and in a padded batch.

    Args:
        channels: channels of every convolution.
    """

    def __init__(self, channels: int = 512, *, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        self.channels = channels
        self.kernels = nnx.List(
            nnx.Param(init(rngs.params(), (k, 1 if i == 0 else channels, channels)))
            for i, k in enumerate(WAV2VEC2_KERNELS)
        )
        self.norm_scale = nnx.Param(jnp.ones(channels))
        self.norm_bias = nnx.Param(jnp.zeros(channels))

    @staticmethod
    def num_frames(num_samples: int) -> int:
        """Frames of an utterance of so many samples."""
        for kernel, stride in zip(WAV2VEC2_KERNELS, WAV2VEC2_STRIDES, strict=True):
            num_samples = conv_length(num_samples, kernel, stride)
        return num_samples

    def __call__(
        self, audio: Audio, lengths: Lengths, key: Array | None = None
    ) -> tuple[Frames, Lengths]:
        """`[b t], [b] -> [b n channels], [b]`. `key` is not used: this front end does not augment."""
        del key
        mask = mask_from_lengths(lengths, audio.shape[1])
        x = zero_padding(audio[..., None], mask)
        # Upstream's epsilon for the waveform: with the 1e-5 of the norms, audio below -50 dBFS comes out otherwise.
        x = zero_padding(_standardize(x, mask[..., None], 1e-7), mask)
        for i, (kernel, stride) in enumerate(zip(self.kernels, WAV2VEC2_STRIDES, strict=True)):
            x = conv1d(x, kernel[...], stride)
            lengths = conv_length(lengths, kernel.shape[0], stride)
            if i == 0:
                mask = mask_from_lengths(lengths, x.shape[1])[..., None]
                x = _standardize(x, mask, 1e-5) * self.norm_scale[...] + self.norm_bias[...]
            x = jax.nn.gelu(x, approximate=False)
        return x, lengths


def _standardize(x: Frames, mask: Array, eps: float) -> Frames:
    """Zero mean and unit variance of every channel over the valid frames; what lies beyond is not cleared."""
    centred = x - masked_mean(x, mask, axis=1)
    variance = masked_mean(jnp.square(centred), mask, axis=1)
    return centred * jax.lax.rsqrt(variance + eps)


class ConvBlock(nnx.Module):
    """Residual block `x + W_2 gelu(W_1 LN(DWConv_k(x)))` over time (after ConvNeXt, arXiv 2201.03545)."""

    def __init__(self, d: int, kernel_size: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(kernel_size**-0.5)
        self.depthwise = nnx.Param(init(rngs.params(), (kernel_size, d)))
        self.norm = nnx.LayerNorm(d, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.expand = nnx.Linear(d, 2 * d, rngs=rngs)
        self.contract = nnx.Linear(2 * d, d, rngs=rngs)

    def __call__(self, x: Frames, mask: Array) -> Frames:
        """`[b n d], [b n] -> [b n d]`."""
        y = self.norm(depthwise_conv(x, self.depthwise[...], mask))
        return x + self.contract(jax.nn.gelu(self.expand(y)))


class LogMelFrontEnd(nnx.Module):
    """Log-mel features, convolutions of stride 2 (each doubles the 10 ms of a frame), residual blocks (ours).

    It stands in for the waveform front end where that one, more than half of wav2vec2-base's multiplications on short
    audio, is too dear to train.

    Args:
        channels: channels out.
        num_mels: mel bins.
        num_strides: convolutions of kernel 3 and stride 2; 2 give frames of 40 ms, 3 of 80 ms.
        num_blocks: residual convolution blocks of kernel 7.
        augment: SpecAugment, applied when a key is given.
    """

    def __init__(
        self,
        channels: int,
        num_mels: int,
        num_strides: int,
        num_blocks: int,
        augment: SpecAugmentConfig,
        *,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.he_normal()
        widths = (num_mels,) + (channels,) * num_strides
        self.channels = channels
        self.num_mels = num_mels
        self.augment = augment
        self.kernels = nnx.List(
            nnx.Param(init(rngs.params(), (SUBSAMPLING_KERNEL, widths[i], widths[i + 1])))
            for i in range(num_strides)
        )
        self.norms = nnx.List(
            nnx.LayerNorm(channels, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
            for _ in range(num_strides)
        )
        self.blocks = nnx.List(ConvBlock(channels, 7, rngs=rngs) for _ in range(num_blocks))

    @staticmethod
    def num_frames(num_samples: int, num_strides: int) -> int:
        """Frames of an utterance of so many samples."""
        frames = conv_length(num_samples, WINDOW, HOP)
        for _ in range(num_strides):
            frames = conv_length(frames, SUBSAMPLING_KERNEL, SUBSAMPLING_STRIDE)
        return frames

    def __call__(
        self, audio: Audio, lengths: Lengths, key: Array | None = None
    ) -> tuple[Frames, Lengths]:
        """`[b t], [b] -> [b n channels], [b]`; SpecAugment when a key is given."""
        audio = jnp.where(mask_from_lengths(lengths, audio.shape[1]), audio, 0.0)
        lengths = feature_lengths(lengths)
        x = normalize_features(log_mel(audio, self.num_mels), lengths)
        if key is not None:
            x = spec_augment(x, lengths, self.augment, key)
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            x = norm(jax.nn.gelu(conv1d(x, kernel[...], SUBSAMPLING_STRIDE)))
            lengths = conv_length(lengths, SUBSAMPLING_KERNEL, SUBSAMPLING_STRIDE)
        mask = mask_from_lengths(lengths, x.shape[1])
        for block in self.blocks:
            x = block(x, mask)
        return zero_padding(x, mask), lengths
