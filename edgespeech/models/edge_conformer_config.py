"""Sizes of the edge Conformer, and what a frame sees of the others in training."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from edgespeech.errors import InputError
from edgespeech.nn.causal_conv import Reach
from edgespeech.nn.chunk_attention import FULL_CONTEXT, Chunks
from edgespeech.nn.conformer import LayerNormKind
from edgespeech.nn.lpa_config import LPAConfig
from edgespeech.nn.streaming_features import StreamingLogMel
from edgespeech.nn.streaming_lpa import STREAMING_CONFIG
from edgespeech.nn.subsampling import StreamingSubsampling
from edgespeech.ops.features import SpecAugmentConfig
from edgespeech.types import SAMPLE_RATE, Array

MixerKind = Literal["attention", "lpa"]
ComputeDtype = Literal["float32", "bfloat16", "float16"]
STRIDE = StreamingLogMel.stride * StreamingSubsampling.stride  # samples of a frame: 640, 40 ms


@dataclasses.dataclass(frozen=True)
class EdgeConformerConfig:
    """Sizes of the model; the defaults are `watch()`. All values are ours.

    Attributes:
        vocab_size: tokens, the blank at 0 included; for the decoder 0 begins and ends a text.
        num_mels: mel bins.
        width: model width d.
        num_layers: Conformer layers.
        num_heads: attention heads; must divide the width, to an even number.
        ffn_width: width of the feed-forward networks.
        conv_kernel: taps of the depthwise convolutions, odd.
        conv_reach: `causal`, or `chunk`: centred within the chunk.
        mixer: `attention`, chunk-wise, or `lpa`, `StreamingLPA`.
        lpa: of the mixer `lpa`.
        norm: `layer`, with statistics in float32, or `lp`, all in `dtype`.
        dtype: of the encoder's computation; parameters, features, softmax and decoder are float32.
        separable: depthwise-separable subsampling, or vanilla.
        chunk: frames of 40 ms of a chunk, when the call names none.
        left: chunks that attention sees before a frame's own, when the call names none.
        train_chunks: chunk sizes in training, each as likely: see `draw_chunks`.
        train_left: left contexts in training, each as likely.
        full_context: probability of full context in training.
        decoder_layers: of the attention decoder.
        ctc_weight: of CTC in the loss, in [0, 1]; the decoder's is the rest.
        dropout: rate, in training.
        spec_augment: masks, in training.

    Raises:
        InputError: a value is out of range.
    """

    vocab_size: int = 256
    num_mels: int = 80
    width: int = 144
    num_layers: int = 16
    num_heads: int = 4
    ffn_width: int = 576
    conv_kernel: int = 15
    conv_reach: Reach = "chunk"
    mixer: MixerKind = "attention"
    lpa: LPAConfig = STREAMING_CONFIG
    norm: LayerNormKind = "layer"
    dtype: ComputeDtype = "float32"
    separable: bool = True
    chunk: int = 16
    left: int = 4
    train_chunks: tuple[int, ...] = (8, 16, 32)
    train_left: tuple[int, ...] = (1, 2, 4, 8)
    full_context: float = 0.25
    decoder_layers: int = 1
    ctc_weight: float = 0.3
    dropout: float = 0.1
    spec_augment: SpecAugmentConfig = dataclasses.field(default_factory=SpecAugmentConfig)

    def __post_init__(self):
        def require(name: str, is_right: bool, limit: str):
            if not is_right:
                raise InputError(f"model.{name} is {getattr(self, name)!r}: it must be {limit}")

        for field in dataclasses.fields(self):
            if field.type is int and field.name != "left":
                require(field.name, getattr(self, field.name) >= 1, "at least 1")
        for name, kind in (
            ("conv_reach", Reach),
            ("mixer", MixerKind),
            ("norm", LayerNormKind),
            ("dtype", ComputeDtype),
        ):
            require(
                name, getattr(self, name) in get_args(kind), f"one of {', '.join(get_args(kind))}"
            )
        channels, rest = divmod(self.width, self.num_heads)
        require(
            "num_heads",
            rest == 0 and channels % 2 == 0,
            f"such that model.width {self.width} is an even number of channels times it",
        )
        require("conv_kernel", self.conv_kernel % 2 == 1, "odd")
        require("left", self.left >= 0, "at least 0")
        require(
            "train_chunks",
            bool(self.train_chunks) and min(self.train_chunks) >= 1,
            "sizes from 1 on",
        )
        require(
            "train_left", bool(self.train_left) and min(self.train_left) >= 0, "numbers from 0 on"
        )
        for name in ("full_context", "ctc_weight"):
            require(name, 0.0 <= getattr(self, name) <= 1.0, "in [0, 1]")
        require("dropout", 0.0 <= self.dropout < 1.0, "in [0, 1)")

    @classmethod
    def watch(cls) -> "EdgeConformerConfig":
        """The size of a watch."""
        return cls()

    @classmethod
    def phone(cls) -> "EdgeConformerConfig":
        """The size of a phone."""
        return cls(vocab_size=1024, width=256, ffn_width=1024, decoder_layers=2)

    @classmethod
    def tiny(cls) -> "EdgeConformerConfig":
        """Four layers that two CPU cores can train in minutes."""
        return cls(
            num_mels=40,
            width=96,
            num_layers=4,
            ffn_width=384,
            ctc_weight=0.5,
            dropout=0.0,
            spec_augment=SpecAugmentConfig(frequency_width=8),
        )

    def num_frames(self, num_samples: int) -> int:
        """Encoder frames of an utterance of so many samples at 16 kHz."""
        return num_samples // STRIDE

    @property
    def frame_seconds(self) -> float:
        """Duration of one encoder frame."""
        return STRIDE / SAMPLE_RATE


def draw_chunks(key: Array, config: EdgeConformerConfig) -> Chunks:
    """Chunk size and left context of one training step: traced numbers, so that nothing is compiled anew.

    With probability `full_context` it is `FULL_CONTEXT`, otherwise one of `train_chunks` and one of `train_left`
    (dynamic chunk training, Zhang et al., 2020, arXiv 2012.05481; the distribution is ours).
    """
    full_key, size_key, left_key = jax.random.split(key, 3)
    is_full = jax.random.bernoulli(full_key, config.full_context)
    size = jax.random.choice(size_key, jnp.array(config.train_chunks))
    left = jax.random.choice(left_key, jnp.array(config.train_left))
    return Chunks(
        jnp.where(is_full, FULL_CONTEXT.size, size), jnp.where(is_full, FULL_CONTEXT.left, left)
    )
