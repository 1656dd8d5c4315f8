"""Moonshine's encoder (arXiv 2410.15608), with a token mixer's slot in every layer: what its models have in common."""

import dataclasses
from typing import Any, NamedTuple, overload

from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.moonshine_front_end import MOONSHINE_STRIDES, MoonshineFrontEnd
from edgespeech.nn.rotary import RotarySelfAttention
from edgespeech.nn.transformer import EncoderLayer, run_layers
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import SAMPLE_RATE, Array, Audio, Frames, Lengths


@dataclasses.dataclass(frozen=True)
class MoonshineEncoderConfig:
    """Sizes of the encoder; the defaults are moonshine-base.

    Attributes:
        width: model width d.
        num_layers: encoder layers.
        num_heads: attention heads; must divide the width.
        ffn_width: width of the feed-forward networks.
        rotary_factor: part of a head's channels that carry positions; the number, rounded down, must be even.

    Raises:
        InputError: a value is out of range.
    """

    width: int = 416
    num_layers: int = 8
    num_heads: int = 8
    ffn_width: int = 1664
    rotary_factor: float = 0.62

    def __post_init__(self):
        for name in ("width", "num_layers", "num_heads", "ffn_width"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        if self.width % self.num_heads:
            raise InputError(
                f"model.num_heads is {self.num_heads}, which does not divide model.width {self.width}: "
                "change either one"
            )
        channels = self.width // self.num_heads
        if self.rotary_width % 2 or not 2 <= self.rotary_width <= channels:
            raise InputError(
                f"model.rotary_factor is {self.rotary_factor}: it gives {self.rotary_width} of the {channels} channels "
                "of a head a position; choose one that gives an even number from 2 on"
            )

    @property
    def rotary_width(self) -> int:
        """Channels of a head that carry a position."""
        return int(self.width // self.num_heads * self.rotary_factor)

    @overload
    def num_frames(self, num_samples: int) -> int: ...
    @overload
    def num_frames(self, num_samples: Lengths) -> Lengths: ...
    def num_frames(self, num_samples: Any) -> Any:
        """Encoder frames of an utterance, or of every row, of so many samples at 16 kHz."""
        return MoonshineFrontEnd.num_frames(num_samples)

    @property
    def frame_seconds(self) -> float:
        """Duration of one encoder frame: 24 ms."""
        first, second, third = MOONSHINE_STRIDES
        return first * second * third / SAMPLE_RATE


class EncoderOutput(NamedTuple):
    """What the encoder returns.

    Attributes:
        memory: `[b n d]`, the output of the last layer, normalised.
        lengths: `[b]`, valid frames.
        hidden: the output `[b n d]` of every layer, in order.
    """

    memory: Frames
    lengths: Lengths
    hidden: tuple[Frames, ...]


class MoonshineEncoder(nnx.Module):
    """The encoder: convolutions on the waveform, layers with rotary attention and norms without bias, a last norm.

    Attributes:
        layers: encoder layers; `layers[i].mixer` is the slot for attention or what replaces it.
        scan_layers: compile equal neighbours once; see `run_layers`. Off at first: training turns it on.
    """

    def __init__(self, config: MoonshineEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.scan_layers = False
        self.front_end = MoonshineFrontEnd(config.width, rngs=rngs)
        self.layers = nnx.List(_encoder_layer(config, rngs) for _ in range(config.num_layers))
        self.norm = moonshine_norm(config.width, rngs)

    def embed(self, audio: Audio, audio_lengths: Lengths) -> tuple[Frames, Lengths]:
        """Audio to the input of the first layer, `[b t], [b] -> [b n d], [b]`.

        Args:
            audio: `[b t]`, float32 in [-1, 1], 16 kHz.
            audio_lengths: `[b]`, valid samples; an utterance's output does not depend on what is beyond.

        Raises:
            InputError: the batch is too short for a frame. A row of it that is too short has 0 frames.
        """
        x, lengths = self.front_end(audio, audio_lengths)
        if x.shape[1] == 0:
            raise InputError(
                f"audio of {audio.shape[1]} samples is too short for a single frame: pad the batch, lengths unchanged"
            )
        return x, lengths

    def run_encoder(self, x: Frames, lengths: Lengths) -> EncoderOutput:
        """All layers on what `embed` gives."""
        keys: tuple[Array | None, ...] = (None,) * len(self.layers)
        hidden = run_layers(self.layers, x, lengths, keys, scan=self.scan_layers)
        memory = zero_padding(self.norm(hidden[-1]), mask_from_lengths(lengths, x.shape[1]))
        return EncoderOutput(memory, lengths, hidden)

    def encode(self, audio: Audio, audio_lengths: Lengths) -> EncoderOutput:
        """Audio to frames, `[b t], [b] -> [b n d], [b]`; arguments and errors as of `embed`."""
        return self.run_encoder(*self.embed(audio, audio_lengths))


def moonshine_norm(d: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm without bias."""
    return nnx.LayerNorm(d, epsilon=1e-5, use_bias=False, use_fast_variance=False, rngs=rngs)


def _encoder_layer(config: MoonshineEncoderConfig, rngs: nnx.Rngs) -> EncoderLayer:
    """The shared layer, norm first, with Moonshine's attention in its slot and norms without bias."""
    d = config.width
    layer = EncoderLayer(
        d, config.num_heads, config.ffn_width, norm_first=True, dropout_rate=0.0, rngs=rngs
    )
    layer.mixer = RotarySelfAttention(d, config.num_heads, config.rotary_width, rngs=rngs)
    layer.mixer_norm = moonshine_norm(d, rngs)
    layer.ffn_norm = moonshine_norm(d, rngs)
    return layer
