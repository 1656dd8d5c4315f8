"""What it takes to reach each exit of an encoder, in multiplications."""

import itertools
from typing import TypeAlias

from edgespeech.models.splitformer import SplitformerConfig
from edgespeech.models.wav2vec2 import Wav2Vec2Config
from edgespeech.models.wav2vec2_exits import Wav2Vec2ExitsConfig
from edgespeech.nn.front_end import (
    SUBSAMPLING_KERNEL,
    SUBSAMPLING_STRIDE,
    WAV2VEC2_KERNELS,
    WAV2VEC2_STRIDES,
)
from edgespeech.ops.conv import conv_length
from edgespeech.ops.features import HOP, WINDOW

BLOCK_KERNEL = 7  # taps of the residual blocks of `LogMelFrontEnd`
ExitConfig: TypeAlias = SplitformerConfig | Wav2Vec2ExitsConfig


def exit_macs(config: ExitConfig, num_samples: int) -> tuple[int, ...]:
    """Multiply-accumulates from the features to the logits of each exit, the heads of the exits before it included.

    Matrix products and convolutions are counted, for one utterance without padding and with attention in every mixer;
    mel features, norms, activations and softmax are not. A branch is counted as if it ran after the layers beside it.

    Args:
        config: of the model.
        num_samples: samples at 16 kHz.

    Returns:
        One number an exit, growing.
    """
    if isinstance(config, SplitformerConfig):
        front_end, segments = _splitformer_parts(config, num_samples)
    else:
        front_end, segments = _wav2vec2_parts(config, num_samples)
    segments[0] += front_end
    return tuple(itertools.accumulate(segments))


def _splitformer_parts(config: SplitformerConfig, num_samples: int) -> tuple[int, list[int]]:
    """Front end, and each exit's block and head."""
    n, d = config.num_frames(num_samples), config.width
    # Two convolutions; the first has its outputs at twice the rate, one more for the kernel's reach.
    first = (n - 1) * SUBSAMPLING_STRIDE + SUBSAMPLING_KERNEL if n else 0
    front_end = SUBSAMPLING_KERNEL * (first * config.num_mels * d + n * d * d)
    return front_end, [
        config.layers_per_exit * _conformer_layer_macs(config, n)
        + (_conformer_layer_macs(config, -(-n // 2)) if config.has_branch(index) else 0)
        + _head_macs(config, n)
        for index in range(config.num_exits)
    ]


def _conformer_layer_macs(config: SplitformerConfig, n: int) -> int:
    d = config.width
    feed_forward = 2 * 2 * d * config.ffn_width
    attention = 4 * d * d + 2 * n * d
    convolution = 2 * d * d + config.conv_kernel * d + d * d
    macs = n * (feed_forward + attention + convolution)
    if config.positions == "relative":
        offsets = max(0, 2 * n - 1)
        macs += offsets * d * d + n * offsets * d
    return macs


def _head_macs(config: SplitformerConfig, n: int) -> int:
    d, width = config.width, config.lstm_width
    if config.head == "linear":
        return n * d * config.vocab_size
    return n * (8 * width * d + 8 * width * width + 2 * width * config.vocab_size)


def _wav2vec2_parts(config: Wav2Vec2ExitsConfig, num_samples: int) -> tuple[int, list[int]]:
    """Front end up to the first layer, and each exit's layers and head."""
    encoder = config.encoder
    n, d = encoder.num_frames(num_samples), encoder.width
    waveform = encoder.front_end == "waveform"
    front_end = (_waveform_macs if waveform else _logmel_macs)(encoder, num_samples)
    positions = encoder.position_kernel * d * (d // encoder.position_groups)
    front_end += n * (encoder.front_channels * d + positions)
    layer = n * (4 * d * d + 2 * n * d + 2 * d * encoder.ffn_width)
    head = n * d * encoder.vocab_size
    return front_end, [
        (last - first) * layer + head for first, last in itertools.pairwise((0, *config.exits))
    ]


def _waveform_macs(config: Wav2Vec2Config, num_samples: int) -> int:
    macs, width, outputs = 0, 1, num_samples
    for i, (kernel, stride) in enumerate(zip(WAV2VEC2_KERNELS, WAV2VEC2_STRIDES, strict=True)):
        outputs = conv_length(outputs, kernel, stride)
        # The first one runs twice: its norm needs the statistics of the whole utterance.
        times = 2 if i == 0 else 1
        macs += times * outputs * kernel * width * config.front_channels
        width = config.front_channels
    return macs


def _logmel_macs(config: Wav2Vec2Config, num_samples: int) -> int:
    c = config.front_channels
    macs, width, outputs = 0, config.num_mels, conv_length(num_samples, WINDOW, HOP)
    for _ in range(config.conv_strides):
        outputs = conv_length(outputs, SUBSAMPLING_KERNEL, SUBSAMPLING_STRIDE)
        macs += outputs * SUBSAMPLING_KERNEL * width * c
        width = c
    return macs + config.conv_blocks * outputs * (BLOCK_KERNEL * c + 4 * c * c)
