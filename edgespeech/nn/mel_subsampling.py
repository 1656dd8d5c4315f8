"""From audio to frames of 40 ms: mel features and two convolutions of stride 2 (early-exit ASR, arXiv 2309.09546)."""

from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.front_end import SUBSAMPLING_KERNEL, SUBSAMPLING_STRIDE, log_mel_frames
from edgespeech.ops.conv import conv1d, conv_length
from edgespeech.ops.features import (
    HOP,
    WINDOW,
    SpecAugmentConfig,
    mel_filters,
)
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import SAMPLE_RATE, Array, Audio, Float, Frames, Lengths

FeatureKind = Literal["paper", "fixed"]

POWER_MEL_WINDOW = 320  # samples: 20 ms
POWER_MEL_FFT = 1024  # points
NUM_CONVOLUTIONS = 2


def power_mel(audio: Audio, lengths: Lengths, num_mels: int) -> Float[Array, "b f m"]:
    """`|STFT|^2 M`: Hann window of 20 ms around every 10 ms, 1024-point DFT, `f = 1 + t // 160`.

    The released code of arXiv 2309.09546: neither logarithm nor normalisation. The audio is mirrored at its ends;
    ours mirrors each utterance at its own end, so that it is the same alone and in a padded batch.

    Args:
        audio: `[b t]`, in [-1, 1], 16 kHz.
        lengths: `[b]`, valid samples.
        num_mels: mel bins m.
    """
    half = POWER_MEL_WINDOW // 2
    centres = np.arange(1 + audio.shape[1] // HOP) * HOP
    index = np.abs(centres[:, None] + np.arange(-half, half)[None, :]).reshape(1, -1)
    last = lengths[:, None] - 1
    index = jnp.where(index > last, 2 * last - index, index)
    # Shorter than a window, an utterance has no second mirror; it gives no encoder frame either.
    index = jnp.clip(index, 0, audio.shape[1] - 1)
    frames = jnp.take_along_axis(audio.astype(jnp.float32), index, axis=1)
    frames = frames.reshape(len(audio), -1, POWER_MEL_WINDOW)
    window = np.hanning(POWER_MEL_WINDOW + 1)[:-1].astype(np.float32)
    # Where in the 1024 points the window lies changes the phase alone.
    spectrum = jnp.fft.rfft(frames * window, n=POWER_MEL_FFT)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    # The filters of torchaudio's default `MelScale`, which upstream uses.
    return power @ mel_filters(num_mels, POWER_MEL_FFT, 0.0, SAMPLE_RATE / 2)


class MelSubsampling(nnx.Module):
    """Mel features, then two convolutions `y = K * x + b` of kernel 3 and stride 2, without activation.

    Attributes:
        features: `paper`: `power_mel`, as released. `fixed` (ours): log-mel features, each bin brought to zero mean
            and unit variance over the utterance, SpecAugment in training.
        kernels, biases: `[3 num_mels d]`, `[3 d d]` and `[d]` each.

    Raises:
        InputError: features is neither.
    """

    def __init__(
        self,
        d: int,
        num_mels: int,
        features: FeatureKind,
        augment: SpecAugmentConfig,
        *,
        rngs: nnx.Rngs,
    ):
        if features not in get_args(FeatureKind):
            raise InputError(
                f"front_end is {features!r}: choose {' or '.join(get_args(FeatureKind))}"
            )
        init = nnx.initializers.xavier_uniform()
        self.features = features
        self.num_mels = num_mels
        self.augment = augment
        self.kernels = nnx.List(
            nnx.Param(init(rngs.params(), (SUBSAMPLING_KERNEL, width, d)))
            for width in (num_mels, d)
        )
        self.biases = nnx.List(nnx.Param(jnp.zeros(d)) for _ in range(NUM_CONVOLUTIONS))

    @staticmethod
    def num_frames(num_samples: int, features: FeatureKind) -> int:
        """Frames of 40 ms of an utterance of so many samples."""
        frames = 1 + num_samples // HOP
        if features == "fixed":
            frames = conv_length(num_samples, WINDOW, HOP)
        for _ in range(NUM_CONVOLUTIONS):
            frames = conv_length(frames, SUBSAMPLING_KERNEL, SUBSAMPLING_STRIDE)
        return frames

    def __call__(
        self, audio: Audio, lengths: Lengths, key: Array | None = None
    ) -> tuple[Frames, Lengths]:
        """`[b t], [b] -> [b n d], [b]`; a key means SpecAugment, in `fixed` alone."""
        if self.features == "paper":
            audio = jnp.where(mask_from_lengths(lengths, audio.shape[1]), audio, 0.0)
            x = power_mel(audio, lengths, self.num_mels)
            lengths = 1 + lengths // HOP
        else:
            x, lengths = log_mel_frames(audio, lengths, self.num_mels, self.augment, key)
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            x = conv1d(x, kernel[...], SUBSAMPLING_STRIDE) + bias[...]
            lengths = conv_length(lengths, SUBSAMPLING_KERNEL, SUBSAMPLING_STRIDE)
        return zero_padding(x, mask_from_lengths(lengths, x.shape[1])), lengths
