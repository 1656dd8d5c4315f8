"""Moonshine (arXiv 2410.15608): a variable-length encoder-decoder, with a token mixer's slot in every encoder layer."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from edgespeech.errors import InputError
from edgespeech.models.moonshine_encoder import (
    MoonshineEncoder,
    MoonshineEncoderConfig,
    moonshine_norm,
)
from edgespeech.nn.decoder_layer import DecoderLayer, LayerCache
from edgespeech.types import Array, Audio, Float, Frames, Int, Lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoonshineConfig(MoonshineEncoderConfig):
    """Sizes of the model; the defaults are moonshine-base.

    Attributes:
        vocab_size: tokens, with those that begin and end a text.
        num_decoder_layers: decoder layers, of the encoder's width and heads.
        bos_id: the token that a text begins with.
        eos_id: the token that ends it.

    Raises:
        InputError: a value is out of range.
    """

    vocab_size: int = 32_768
    num_decoder_layers: int = 8
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self):
        super().__post_init__()
        for name in ("vocab_size", "num_decoder_layers"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
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


class Moonshine(MoonshineEncoder):
    """The encoder-decoder. Parameters are float32; see `cast` for bfloat16.

    Attributes:
        decoder_layers: decoder layers.
        embedding: `[v d]`, of the tokens, and the output layer as well.
    """

    def __init__(self, config: MoonshineConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.config = config
        d = config.width
        self.embedding = nnx.Param(
            nnx.initializers.normal(d**-0.5)(rngs.params(), (config.vocab_size, d))
        )
        self.decoder_layers = nnx.List(
            DecoderLayer(d, config.num_heads, config.ffn_width, config.rotary_width, rngs=rngs)
            for _ in range(config.num_decoder_layers)
        )
        self.decoder_norm = moonshine_norm(d, rngs)

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


def decoder_input(labels: Int[Array, "b u"], bos_id: int) -> Int[Array, "b u"]:
    """The tokens before each label: `bos_id`, then the labels without the last."""
    return jnp.concatenate([jnp.full_like(labels[:, :1], bos_id), labels[:, :-1]], axis=1)


def cast(model: nnx.Module, dtype: DTypeLike) -> None:
    """Changes the dtype of all parameters in place; Moonshine computes in its parameters' dtype.

    Softmax, norms' statistics and the losses stay in float32.
    """
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p.astype(dtype), params))
