"""What it takes to reach each exit of an early-exit encoder, in multiplications."""

import itertools

from edgespeech.models.splitformer import SplitformerConfig
from edgespeech.nn.front_end import SUBSAMPLING_KERNEL, SUBSAMPLING_STRIDE


def exit_macs(config: SplitformerConfig, num_samples: int) -> tuple[int, ...]:
    """Multiply-accumulates from the features to the logits of each exit, the heads of the exits before it included.

    Matrix products and convolutions are counted, for one utterance without padding and with attention in every mixer;
    features, norms, activations and softmax are not. A branch is counted as if it ran after the layers beside it.

    Args:
        config: of the model.
        num_samples: samples at 16 kHz.

    Returns:
        One number an exit, growing.
    """
    n, d = config.num_frames(num_samples), config.width
    # Two convolutions; the first has its outputs at twice the rate, one more for the kernel's reach.
    first = (n - 1) * SUBSAMPLING_STRIDE + SUBSAMPLING_KERNEL if n else 0
    front_end = SUBSAMPLING_KERNEL * (first * config.num_mels * d + n * d * d)
    segments = [
        config.layers_per_exit * _layer_macs(config, n)
        + (_layer_macs(config, -(-n // 2)) if config.has_branch(index) else 0)
        + _head_macs(config, n)
        for index in range(config.num_exits)
    ]
    segments[0] += front_end
    return tuple(itertools.accumulate(segments))


def _layer_macs(config: SplitformerConfig, n: int) -> int:
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
