"""The wav2vec 2.0 encoder with a CTC head (arXiv 2006.11477), with a slot for the token mixer in every layer."""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.front_end import LogMelFrontEnd, WaveformFrontEnd
from edgespeech.nn.transformer import ConvPositions, EncoderLayer, run_layers
from edgespeech.ops.dropout import dropout
from edgespeech.ops.features import SpecAugmentConfig, time_spans
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Audio, Frames, Lengths, Logits

Padding: TypeAlias = Literal["exact", "upstream"]


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config:
    """Sizes of the encoder; the defaults are wav2vec2-base.

    Attributes:
        vocab_size: tokens of the head, the blank at 0 included.
        width: model width d.
        num_layers: encoder layers.
        num_heads: attention heads; must divide the width.
        ffn_width: width of the feed-forward networks.
        norm_first: layer norm before mixer and feed-forward (True) or after the residual (False, wav2vec2-base).
        front_end: `waveform` (20 ms frames) or `logmel`.
        front_channels: channels of the front end.
        num_mels: mel bins of the log-mel front end.
        conv_strides: convolutions of stride 2 in the log-mel front end: 2 give frames of 40 ms, 3 of 80 ms.
        conv_blocks: residual convolution blocks of the log-mel front end.
        position_kernel: taps of the convolutional position embedding.
        position_groups: its groups; must divide the width.
        padding: `exact`, an utterance's output is the same alone and in any padded batch; `upstream` (waveform front
            end only), as PyTorch computes wav2vec2-base without an attention mask: group norm, positions and token
            mixers take padding for audio, and the output depends on the length of the batch.
        dropout: rate, in training.
        spec_augment: masks, in training. The waveform front end uses the time masks alone, on frames of 20 ms.

    Raises:
        InputError: a value is out of range.
    """

    vocab_size: int = 32
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_width: int = 3072
    norm_first: bool = False
    front_end: Literal["waveform", "logmel"] = "waveform"
    front_channels: int = 512
    num_mels: int = 80
    conv_strides: int = 2
    conv_blocks: int = 0
    position_kernel: int = 128
    position_groups: int = 16
    padding: Padding = "exact"
    dropout: float = 0.1
    spec_augment: SpecAugmentConfig = dataclasses.field(default_factory=SpecAugmentConfig)

    def __post_init__(self):
        for name in (
            "vocab_size",
            "width",
            "num_layers",
            "num_heads",
            "ffn_width",
            "front_channels",
            "num_mels",
            "conv_strides",
            "position_kernel",
            "position_groups",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        if self.conv_blocks < 0:
            raise InputError(f"model.conv_blocks is {self.conv_blocks}: it must be at least 0")
        for name in ("num_heads", "position_groups"):
            if self.width % getattr(self, name):
                raise InputError(
                    f"model.{name} is {getattr(self, name)}, which does not divide model.width {self.width}: "
                    "change either one"
                )
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"model.dropout is {self.dropout}: it must be in [0, 1)")
        if self.front_end not in ("waveform", "logmel"):
            raise InputError(f"model.front_end is {self.front_end!r}: choose waveform or logmel")
        if self.padding not in ("exact", "upstream"):
            raise InputError(f"model.padding is {self.padding!r}: choose exact or upstream")
        if self.padding == "upstream" and self.front_end != "waveform":
            raise InputError(
                f"model.padding is 'upstream' and model.front_end {self.front_end!r}, which PyTorch's wav2vec2 lacks: "
                "choose exact, or the front end waveform"
            )

    @classmethod
    def base(cls) -> "Wav2Vec2Config":
        """wav2vec2-base: 94,396,320 parameters with the 32-character head."""
        return cls()

    @classmethod
    def tiny(cls) -> "Wav2Vec2Config":
        """Twelve layers that two CPU cores can train in minutes: frames of 80 ms, layer norm first (ours)."""
        return cls(
            width=144,
            num_heads=4,
            ffn_width=576,
            norm_first=True,
            front_end="logmel",
            front_channels=144,
            conv_strides=3,
            conv_blocks=8,
            position_kernel=15,
            position_groups=144,
            dropout=0.0,
            spec_augment=SpecAugmentConfig(frequency_width=12),
        )

    @classmethod
    def small(cls) -> "Wav2Vec2Config":
        """For some ten hours of real speech on a few cores: frames of 80 ms, which ask for word pieces (ours)."""
        return cls(
            width=192,
            num_heads=4,
            ffn_width=768,
            norm_first=True,
            front_end="logmel",
            front_channels=192,
            conv_strides=3,
            conv_blocks=4,
            position_kernel=31,
            position_groups=192,
        )

    @overload
    def num_frames(self, num_samples: int) -> int: ...
    @overload
    def num_frames(self, num_samples: Lengths) -> Lengths: ...
    def num_frames(self, num_samples: Any) -> Any:
        """Encoder frames of an utterance, or of every row, of so many samples at 16 kHz."""
        if self.front_end == "waveform":
            return WaveformFrontEnd.num_frames(num_samples)
        return LogMelFrontEnd.num_frames(num_samples, self.conv_strides)

    @property
    def frame_seconds(self) -> float:
        """Duration of one encoder frame."""
        return 0.02 if self.front_end == "waveform" else 0.01 * 2**self.conv_strides


class CTCOutput(NamedTuple):
    """What an encoder with a CTC head returns.

    Attributes:
        logits: `[b n v]`, unnormalised.
        lengths: `[b]`, frames of the utterance, padding not counted even where the layers see it.
        hidden: the output `[b n d]` of every layer, in order.
    """

    logits: Logits
    lengths: Lengths
    hidden: tuple[Frames, ...]


class Wav2Vec2(nnx.Module):
    """wav2vec 2.0 with a CTC head.

    Attributes:
        layers: encoder layers; `layers[i].mixer` is the slot for attention or what replaces it.
        scan_layers: compile equal neighbours once; see `run_layers`. Off at first: training turns it on.
    """

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.scan_layers = False
        d, channels = config.width, config.front_channels
        if config.front_end == "waveform":
            self.front_end = WaveformFrontEnd(channels, rngs=rngs)
            # Frames under a time mask become this learned vector (wav2vec 2.0, section 3.1).
            self.mask_embedding = nnx.Param(nnx.initializers.uniform(1.0)(rngs.params(), (d,)))
        else:
            self.front_end = LogMelFrontEnd(
                channels,
                config.num_mels,
                config.conv_strides,
                config.conv_blocks,
                config.spec_augment,
                rngs=rngs,
            )
        self.projection_norm = nnx.LayerNorm(
            channels, epsilon=1e-5, use_fast_variance=False, rngs=rngs
        )
        self.projection = nnx.Linear(channels, d, rngs=rngs)
        self.positions = ConvPositions(d, config.position_kernel, config.position_groups, rngs=rngs)
        self.norm = nnx.LayerNorm(d, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        # With the norm first, 2 L branches add up on the residual stream. Starting them at 1 / (2 L) of their size
        # leaves the front end in charge at first (ours). CTC loss per token of the tiny preset after 470 steps: 4.2
        # at full size, 3.1 at 0.2, 2.4 at 0.05, 2.7 at 0.
        branch_scale = 1.0 / (2 * config.num_layers) if config.norm_first else 1.0
        self.layers = nnx.List(
            EncoderLayer(
                d,
                config.num_heads,
                config.ffn_width,
                norm_first=config.norm_first,
                dropout_rate=config.dropout,
                branch_scale=branch_scale,
                rngs=rngs,
            )
            for _ in range(config.num_layers)
        )
        self.head = nnx.Linear(d, config.vocab_size, rngs=rngs)

    def __call__(self, audio: Audio, audio_lengths: Lengths, key: Array | None = None) -> CTCOutput:
        """Audio to logits.

        Args:
            audio: `[b t]`, float32 in [-1, 1], 16 kHz.
            audio_lengths: `[b]`, valid samples; what is beyond is never read, and with `padding="exact"` its extent
                changes nothing either.
            key: a random key: training, with dropout and SpecAugment. None: inference.

        Raises:
            InputError: the batch is too short for a frame. A row of it that is too short has 0 frames.
        """
        keys = (None,) * (len(self.layers) + 2)
        if key is not None:
            keys = tuple(jax.random.split(key, len(keys)))
        augment_key, dropout_key, *layer_keys = keys
        x, lengths = self.embed(audio, audio_lengths, augment_key, dropout_key)
        hidden = run_layers(self.layers, x, lengths, layer_keys, scan=self.scan_layers)
        frames = self.config.num_frames(audio_lengths)
        return CTCOutput(self.logits(hidden[-1], lengths), frames, hidden)

    def embed(
        self,
        audio: Audio,
        audio_lengths: Lengths,
        augment_key: Array | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Frames, Lengths]:
        """Audio to the input of the first layer and the lengths that layers see: `[b t], [b] -> [b n d], [b]`.

        SpecAugment and dropout only with their keys.

        Raises:
            InputError: the batch is too short for a frame. A row of it that is too short has 0 frames.
        """
        audio = jnp.where(mask_from_lengths(audio_lengths, audio.shape[1]), audio, 0.0)
        if self.config.padding == "upstream":
            assert isinstance(self.front_end, WaveformFrontEnd)  # the config has no other
            x, lengths = self.front_end(audio, audio_lengths, sees_padding=True)
        else:
            x, lengths = self.front_end(audio, audio_lengths, augment_key)
        if x.shape[1] == 0:
            raise InputError(
                f"audio of {audio.shape[1]} samples is too short for a single frame: pad the batch, lengths unchanged"
            )
        x = self.projection(self.projection_norm(x))
        if augment_key is not None and self.config.front_end == "waveform":
            masked = time_spans(augment_key, lengths, x.shape[1], self.config.spec_augment)
            x = jnp.where(masked[..., None], self.mask_embedding[...], x)
        x = zero_padding(x, mask_from_lengths(lengths, x.shape[1]))
        x = x + self.positions(x, lengths)
        if not self.config.norm_first:
            x = self.norm(x)
        return dropout(x, self.config.dropout, dropout_key), lengths

    def logits(self, hidden: Frames, lengths: Lengths) -> Logits:
        """The head on the output of any layer, `[b n d], [b] -> [b n v]`; it takes every frame by itself."""
        del lengths
        if self.config.norm_first:
            hidden = self.norm(hidden)
        return self.head(hidden)


def count_parameters(module: nnx.Module) -> int:
    """Trainable parameters of a module."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
