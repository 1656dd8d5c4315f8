"""Moonshine (arXiv 2410.15608): a variable-length encoder-decoder, with a token mixer's slot in every encoder layer."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from edgespeech.errors import InputError
from edgespeech.nn.decoder_layer import DecoderLayer, LayerCache
from edgespeech.nn.moonshine_front_end import MOONSHINE_STRIDES, MoonshineFrontEnd
from edgespeech.nn.rotary import RotarySelfAttention
from edgespeech.nn.transformer import EncoderLayer, run_layers
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import SAMPLE_RATE, Array, Audio, Float, Frames, Int, Lengths


@dataclasses.dataclass(frozen=True)
class MoonshineConfig:
    """Sizes of the model; the defaults are moonshine-base.

    Attributes:
        vocab_size: tokens, with those that begin and end a text.
        width: model width d of encoder and decoder.
        num_layers: encoder layers.
        num_decoder_layers: decoder layers.
        num_heads: attention heads; must divide the width.
        ffn_width: width of the feed-forward networks.
        rotary_factor: part of a head's channels that carry positions; the number, rounded down, must be even.
        bos_id: the token that a text begins with.
        eos_id: the token that ends it.

    Raises:
        InputError: a value is out of range.
    """

    vocab_size: int = 32_768
    width: int = 416
    num_layers: int = 8
    num_decoder_layers: int = 8
    num_heads: int = 8
    ffn_width: int = 1664
    rotary_factor: float = 0.62
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self):
        for name in ("vocab_size", "width", "num_layers", "num_heads", "ffn_width"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        if self.num_decoder_layers < 1:
            raise InputError(
                f"model.num_decoder_layers is {self.num_decoder_layers}: it must be at least 1"
            )
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
        for name in ("bos_id", "eos_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise InputError(
                    f"model.{name} is {getattr(self, name)}: it must be in the vocabulary of {self.vocab_size}"
                )

    @classmethod
    def base(cls) -> "MoonshineConfig":
        """moonshine-base: 61,513,920 parameters."""
        return cls()

    @classmethod
    def tiny(cls) -> "MoonshineConfig":
        """moonshine-tiny: 27,092,736 parameters."""
        return cls(width=288, num_layers=6, num_decoder_layers=6, ffn_width=1152, rotary_factor=0.9)

    @property
    def rotary_width(self) -> int:
        """Channels of a head that carry a position."""
        return int(self.width // self.num_heads * self.rotary_factor)

    def num_frames(self, num_samples: int) -> int:
        """Encoder frames of an utterance of so many samples at 16 kHz."""
        return MoonshineFrontEnd.num_frames(num_samples)

    @property
    def frame_seconds(self) -> float:
        """Duration of one encoder frame: 24 ms."""
        first, second, third = MOONSHINE_STRIDES
        return first * second * third / SAMPLE_RATE


class MoonshineOutput(NamedTuple):
    """What the model returns for audio and the tokens before each prediction.

    Attributes:
        logits: `[b u v]`, unnormalised; position i predicts the token after `tokens[:, i]`.
        lengths: `[b]`, valid encoder frames.
        hidden: the output `[b n d]` of every encoder layer, in order.
        memory: `[b n d]`, the encoder's output: the last of them, normalised.
        decoder_hidden: the output `[b u d]` of every decoder layer, in order.
    """

    logits: Float[Array, "b u v"]
    lengths: Lengths
    hidden: tuple[Frames, ...]
    memory: Frames
    decoder_hidden: tuple[Float[Array, "b u d"], ...]


class EncoderOutput(NamedTuple):
    """What the encoder returns: see `MoonshineOutput`."""

    memory: Frames
    lengths: Lengths
    hidden: tuple[Frames, ...]


class Moonshine(nnx.Module):
    """The encoder-decoder. Parameters are float32; see `cast` for bfloat16.

    Attributes:
        layers: encoder layers; `layers[i].mixer` is the slot for attention or what replaces it.
        decoder_layers: decoder layers.
        embedding: `[v d]`, of the tokens, and the output layer as well.
        scan_layers: compile equal neighbours of the encoder once; see `run_layers`. Off at first: training turns it on.
    """

    def __init__(self, config: MoonshineConfig, *, rngs: nnx.Rngs):
        d = config.width
        self.config = config
        self.scan_layers = False
        self.front_end = MoonshineFrontEnd(d, rngs=rngs)
        self.layers = nnx.List(_encoder_layer(config, rngs) for _ in range(config.num_layers))
        self.norm = _norm(d, rngs)
        self.embedding = nnx.Param(
            nnx.initializers.normal(d**-0.5)(rngs.params(), (config.vocab_size, d))
        )
        self.decoder_layers = nnx.List(
            DecoderLayer(d, config.num_heads, config.ffn_width, config.rotary_width, rngs=rngs)
            for _ in range(config.num_decoder_layers)
        )
        self.decoder_norm = _norm(d, rngs)

    def __call__(
        self,
        audio: Audio,
        audio_lengths: Lengths,
        tokens: Int[Array, "b u"],
        token_lengths: Lengths,
    ) -> MoonshineOutput:
        """Audio and the tokens so far to the logits of the next, at all positions at once.

        Args:
            audio: `[b t]`, float32 in [-1, 1], 16 kHz.
            audio_lengths: `[b]`, valid samples; an utterance's output does not depend on what is beyond.
            tokens: the decoder's input, a text's tokens after `bos_id`: see `decoder_input`.
            token_lengths: valid ones, the first counted.

        Raises:
            InputError: the batch is too short for a frame. A row of it that is too short has 0 frames.
        """
        memory, lengths, hidden = self.encode(audio, audio_lengths)
        x = self.embedding[...][tokens]
        decoder_hidden = []
        for layer in self.decoder_layers:
            x = layer(x, token_lengths, memory, lengths)
            decoder_hidden.append(x)
        return MoonshineOutput(self._logits(x), lengths, hidden, memory, tuple(decoder_hidden))

    def encode(self, audio: Audio, audio_lengths: Lengths) -> EncoderOutput:
        """Audio to frames, `[b t], [b] -> [b n d], [b]`; arguments and errors as in `__call__`."""
        x, lengths = self.front_end(audio, audio_lengths)
        if x.shape[1] == 0:
            raise InputError(
                f"audio of {audio.shape[1]} samples is too short for a single frame: pad the batch, lengths unchanged"
            )
        keys = (None,) * len(self.layers)
        hidden = run_layers(self.layers, x, lengths, keys, scan=self.scan_layers)
        memory = zero_padding(self.norm(hidden[-1]), mask_from_lengths(lengths, x.shape[1]))
        return EncoderOutput(memory, lengths, hidden)

    def init_cache(
        self, memory: Frames, memory_lengths: Lengths, size: int
    ) -> tuple[LayerCache, ...]:
        """The decoder's cache before the first token.

        Args:
            memory: the encoder's output.
            memory_lengths: its valid frames.
            size: the most tokens that `step` will be given.
        """
        return tuple(
            layer.init_cache(memory, memory_lengths, size) for layer in self.decoder_layers
        )

    def step(
        self,
        tokens: Int[Array, "b"],
        position: Int[Array, ""],
        cache: tuple[LayerCache, ...],
        memory_lengths: Lengths,
    ) -> tuple[Float[Array, "b v"], tuple[LayerCache, ...]]:
        """One token of every row, to the logits of the next and the cache with it: what `__call__` gives at a position.

        Args:
            tokens: the token at that position.
            position: from 0 to the cache's size - 1; all before it were given already.
            cache: from `init_cache` or the step before.
            memory_lengths: valid frames.
        """
        x = self.embedding[...][tokens][:, None]
        filled = []
        for layer, old in zip(self.decoder_layers, cache, strict=True):
            x, new = layer.step(x, position, old, memory_lengths)
            filled.append(new)
        return self._logits(x)[:, 0], tuple(filled)

    def reorder_cache(
        self, cache: tuple[LayerCache, ...], rows: Int[Array, "b"]
    ) -> tuple[LayerCache, ...]:
        """The cache whose row i continues the tokens of row `rows[i]`, which is of the same utterance."""
        return tuple(
            layer._replace(past=jax.tree.map(lambda a: a[rows], layer.past)) for layer in cache
        )

    def _logits(self, x: Float[Array, "b u d"]) -> Float[Array, "b u v"]:
        return self.decoder_norm(x) @ self.embedding[...].T


def _norm(d: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(d, epsilon=1e-5, use_bias=False, use_fast_variance=False, rngs=rngs)


def _encoder_layer(config: MoonshineConfig, rngs: nnx.Rngs) -> EncoderLayer:
    """The shared layer, norm first, with Moonshine's attention in its slot and norms without bias."""
    d = config.width
    layer = EncoderLayer(
        d, config.num_heads, config.ffn_width, norm_first=True, dropout_rate=0.0, rngs=rngs
    )
    layer.mixer = RotarySelfAttention(d, config.num_heads, config.rotary_width, rngs=rngs)
    layer.mixer_norm = _norm(d, rngs)
    layer.ffn_norm = _norm(d, rngs)
    return layer


def decoder_input(labels: Int[Array, "b u"], bos_id: int) -> Int[Array, "b u"]:
    """The tokens before each label: `bos_id`, then the labels without the last."""
    return jnp.concatenate([jnp.full_like(labels[:, :1], bos_id), labels[:, :-1]], axis=1)


def cast(model: nnx.Module, dtype: DTypeLike) -> None:
    """Changes the dtype of all parameters in place; Moonshine computes in its parameters' dtype.

    Softmax, norms' statistics and the losses stay in float32.
    """
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p.astype(dtype), params))
