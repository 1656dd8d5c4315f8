"""From audio to frames: the convolutional front ends of the wav2vec2 encoder."""

from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

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
from edgespeech.types import Array, Audio, Float, Frames, Lengths

WAV2VEC2_KERNELS = (10, 3, 3, 3, 3, 2, 2)
WAV2VEC2_STRIDES = (5, 2, 2, 2, 2, 2, 2)
FRAME = 320  # samples from one frame to the next, 20 ms
RECEPTIVE_FIELD = 400  # samples that a frame sees
CHUNK = 200  # frames computed at a time: 120 s of audio in one go would hold 1.5 GB
SUBSAMPLING_KERNEL = 3
SUBSAMPLING_STRIDE = 2


class WaveformFrontEnd(nnx.Module):
    """Seven convolutions over the waveform, 320 samples (20 ms) a frame (wav2vec 2.0, arXiv 2006.11477, section 2).

    The waveform is brought to zero mean and unit variance, the first convolution is followed by a group norm of one
    channel a group, which runs over time, and every one by GELU. Statistics are taken over an utterance's own valid
    positions, so its frames are the same alone and in a padded batch. Memory does not grow with the audio but by what
    comes out: a first pass over chunks gathers the statistics, a second one computes the frames.

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

    @overload
    @staticmethod
    def num_frames(num_samples: int) -> int: ...
    @overload
    @staticmethod
    def num_frames(num_samples: Lengths) -> Lengths: ...
    @staticmethod
    def num_frames(num_samples: Any) -> Any:
        """Frames of an utterance, or of every row, of so many samples."""
        for kernel, stride in zip(WAV2VEC2_KERNELS, WAV2VEC2_STRIDES, strict=True):
            num_samples = conv_length(num_samples, kernel, stride)
        return num_samples

    def __call__(
        self,
        audio: Audio,
        lengths: Lengths,
        key: Array | None = None,
        *,
        sees_padding: bool = False,
    ) -> tuple[Frames, Lengths]:
        """`[b t], [b] -> [b n channels], [b]`. `key` is not used: this front end does not augment.

        With `sees_padding` the zeros after a standardised utterance count as audio, in the group norm and in the
        lengths that are returned: PyTorch's wav2vec2-base without an attention mask.
        """
        del key
        mask = mask_from_lengths(lengths, audio.shape[1])
        # Upstream's epsilon for the waveform: with the 1e-5 of the norms, audio below -50 dBFS comes out otherwise.
        x = jnp.where(mask, _standardize(jnp.where(mask, audio, 0.0), mask, 1e-7), 0.0)
        if sees_padding:
            lengths = jnp.full_like(lengths, x.shape[1])
        scale, bias = self._group_norm(
            x, conv_length(lengths, WAV2VEC2_KERNELS[0], WAV2VEC2_STRIDES[0])
        )

        def convolutions(chunk: Audio) -> Frames:
            y = chunk[..., None]
            for i, (kernel, stride) in enumerate(zip(self.kernels, WAV2VEC2_STRIDES, strict=True)):
                y = conv1d(y, kernel[...], stride)
                y = jax.nn.gelu(y * scale + bias if i == 0 else y, approximate=False)
            return y

        n = self.num_frames(x.shape[1])
        frames = lax.map(convolutions, _chunks(x, n, CHUNK, FRAME, RECEPTIVE_FIELD - FRAME))
        frames = jnp.moveaxis(frames, 0, 1).reshape(x.shape[0], -1, self.channels)
        return frames[:, :n], self.num_frames(lengths)

    def _group_norm(self, x: Audio, lengths: Lengths) -> tuple[Array, Array]:
        """Scale and bias `[b 1 channels]` that the norm gives the first convolution, over its `lengths` valid outputs.

        Moments of a sum: `E y^2 - (E y)^2` loses nothing here, because a waveform of mean zero leaves E y near zero.
        """
        kernel, stride = self.kernels[0][...], WAV2VEC2_STRIDES[0]
        n = conv_length(x.shape[1], WAV2VEC2_KERNELS[0], stride)
        chunks = _chunks(x, n, CHUNK * FRAME // stride, stride, WAV2VEC2_KERNELS[0] - stride)

        def moments(operands):
            chunk, first = operands
            y = conv1d(chunk[..., None], kernel, stride)
            valid = first + jnp.arange(y.shape[1]) < lengths[:, None]
            y = jnp.where(valid[..., None], y, 0.0)
            return y.sum(1, keepdims=True), jnp.square(y).sum(1, keepdims=True)

        size = (chunks.shape[2] - WAV2VEC2_KERNELS[0]) // stride + 1
        total, square = lax.map(moments, (chunks, jnp.arange(chunks.shape[0]) * size))
        count = jnp.maximum(lengths, 1)[:, None, None]
        mean = total.sum(0) / count
        variance = square.sum(0) / count - jnp.square(mean)
        scale = self.norm_scale[...] * lax.rsqrt(variance + 1e-5)
        return scale, self.norm_bias[...] - mean * scale


def _chunks(
    x: Audio, count: int, most: int, hop: int, overlap: int
) -> Float[Array, "chunks b samples"]:
    """The waveform in equal pieces that together hold `count` windows, `hop` samples apart and `hop + overlap` long.

    A piece holds at most `most` windows; pieces overlap by `overlap` samples, and zeros follow the waveform.
    """
    chunks = max(1, -(-count // most))
    size = max(1, -(-count // chunks)) * hop
    x = jnp.pad(x, ((0, 0), (0, max(0, (chunks + 1) * size - x.shape[1]))))
    x = x[:, : (chunks + 1) * size].reshape(x.shape[0], chunks + 1, size)
    return jnp.swapaxes(jnp.concatenate([x[:, :-1], x[:, 1:, :overlap]], axis=-1), 0, 1)


def log_mel_frames(
    audio: Audio, lengths: Lengths, num_mels: int, augment: SpecAugmentConfig, key: Array | None
) -> tuple[Frames, Lengths]:
    """Normalised log-mel frames of 10 ms: `[b t], [b] -> [b f m], [b]`; what is beyond the lengths has no part in it.

    Args:
        audio: in [-1, 1], 16 kHz.
        lengths: valid samples.
        num_mels: mel bins m.
        augment: SpecAugment, applied when a key is given.
        key: a random key, or None.
    """
    audio = jnp.where(mask_from_lengths(lengths, audio.shape[1]), audio, 0.0)
    lengths = feature_lengths(lengths)
    x = normalize_features(log_mel(audio, num_mels), lengths)
    return x if key is None else spec_augment(x, lengths, augment, key), lengths


def _standardize(x: Array, mask: Array, eps: float) -> Array:
    """Zero mean and unit variance along axis 1 over the valid positions; what lies beyond is not cleared."""
    centred = x - masked_mean(x, mask, axis=1)
    variance = masked_mean(jnp.square(centred), mask, axis=1)
    return centred * lax.rsqrt(variance + eps)


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

    @overload
    @staticmethod
    def num_frames(num_samples: int, num_strides: int) -> int: ...
    @overload
    @staticmethod
    def num_frames(num_samples: Lengths, num_strides: int) -> Lengths: ...
    @staticmethod
    def num_frames(num_samples: Any, num_strides: int) -> Any:
        """Frames of an utterance, or of every row, of so many samples."""
        frames = conv_length(num_samples, WINDOW, HOP)
        for _ in range(num_strides):
            frames = conv_length(frames, SUBSAMPLING_KERNEL, SUBSAMPLING_STRIDE)
        return frames

    def __call__(
        self, audio: Audio, lengths: Lengths, key: Array | None = None
    ) -> tuple[Frames, Lengths]:
        """`[b t], [b] -> [b n channels], [b]`; SpecAugment when a key is given."""
        x, lengths = log_mel_frames(audio, lengths, self.num_mels, self.augment, key)
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            x = norm(jax.nn.gelu(conv1d(x, kernel[...], SUBSAMPLING_STRIDE)))
            lengths = conv_length(lengths, SUBSAMPLING_KERNEL, SUBSAMPLING_STRIDE)
        mask = mask_from_lengths(lengths, x.shape[1])
        for block in self.blocks:
            x = block(x, mask)
        return zero_padding(x, mask), lengths
