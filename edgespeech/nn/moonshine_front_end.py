"""Moonshine's front end: three convolutions from the waveform to frames of 24 ms."""

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.nn.masked_norm import MaskedNorm
from edgespeech.ops.conv import conv1d, conv_length
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Audio, Frames, Lengths

MOONSHINE_KERNELS = (127, 7, 3)
MOONSHINE_STRIDES = (64, 3, 2)


class MoonshineFrontEnd(nnx.Module):
    """Convolutions of kernel 127, 7, 3 and stride 64, 3, 2: one frame for 384 samples (arXiv 2410.15608).

        x = groupnorm(tanh(K_1 * audio));   x = gelu(K_2 * x + b_2);   x = gelu(K_3 * x + b_3)

    The group norm has one group: mean and variance over channels and time. They are taken over an utterance's own
    frames, so that its output is the same alone and in a padded batch.

    Attributes:
        kernels: `[127 1 d]`, `[7 d 2d]`, `[3 2d d]`.
        biases: of the second and third convolution.
        norm: the group norm.
    """

    def __init__(self, d: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        widths = (1, d, 2 * d, d)
        self.kernels = nnx.List(
            nnx.Param(init(rngs.params(), (k, widths[i], widths[i + 1])))
            for i, k in enumerate(MOONSHINE_KERNELS)
        )
        self.biases = nnx.List(nnx.Param(jnp.zeros(width)) for width in widths[2:])
        self.norm = MaskedNorm(d, "group")

    @staticmethod
    def num_frames(num_samples: int) -> int:
        """Frames of an utterance of so many samples."""
        for kernel, stride in zip(MOONSHINE_KERNELS, MOONSHINE_STRIDES, strict=True):
            num_samples = conv_length(num_samples, kernel, stride)
        return num_samples

    def __call__(self, audio: Audio, lengths: Lengths) -> tuple[Frames, Lengths]:
        """`[b t], [b] -> [b n d], [b]`, in the kernels' dtype; frames of the padding are zero."""
        x = zero_padding(audio[..., None], mask_from_lengths(lengths, audio.shape[1]))
        x = x.astype(self.kernels[0][...].dtype)
        for i, (kernel, stride) in enumerate(zip(self.kernels, MOONSHINE_STRIDES, strict=True)):
            x = conv1d(x, kernel[...], stride)
            lengths = conv_length(lengths, kernel.shape[0], stride)
            if i == 0:
                x = self.norm(jnp.tanh(x), mask_from_lengths(lengths, x.shape[1]))
            else:
                x = jax.nn.gelu(x + self.biases[i - 1][...], approximate=False)
        return zero_padding(x, mask_from_lengths(lengths, x.shape[1])), lengths
