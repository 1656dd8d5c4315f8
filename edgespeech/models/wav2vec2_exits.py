"""A wav2vec2 encoder with early exits: a CTC head, shared or its own, after chosen layers."""

import dataclasses
from collections.abc import Sequence

import jax
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.models.splitformer import ExitOutput, run_exits
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from edgespeech.nn.transformer import EncoderLayer
from edgespeech.types import Array, Audio, Frames, Lengths, Logits


@dataclasses.dataclass(frozen=True)
class Wav2Vec2ExitsConfig:
    """An encoder and where it may be left.

    Attributes:
        encoder: sizes of the encoder.
        exits: the layers, from 1, after which there is an exit, ascending; the last layer is one.
        own_heads: a linear layer for every exit instead of one for all.

    Raises:
        InputError: exits are not ascending layers of the encoder that end with its last, or its padding is `upstream`,
            where an utterance alone differs from one in a batch.
    """

    encoder: Wav2Vec2Config
    exits: tuple[int, ...]
    own_heads: bool = False

    def __post_init__(self):
        exits, last = self.exits, self.encoder.num_layers
        if not exits or list(exits) != sorted(set(exits)) or exits[0] < 1 or exits[-1] != last:
            raise InputError(
                f"exits are {exits}: give ascending layers of the encoder, from 1 to {last}"
            )
        if self.encoder.padding != "exact":
            raise InputError(
                "model.padding is 'upstream': exits regroup batches, which asks for 'exact'"
            )

    @classmethod
    def evenly(
        cls, encoder: Wav2Vec2Config, num_exits: int, own_heads: bool = False
    ) -> "Wav2Vec2ExitsConfig":
        """An exit after every so many layers: 12 layers and 6 exits make 2, 4, ..., 12 (arXiv 2309.09546).

        Raises:
            InputError: the layers cannot be parted so.
        """
        if num_exits < 1 or encoder.num_layers % num_exits:
            raise InputError(
                f"{encoder.num_layers} layers cannot be parted into {num_exits} equal groups: change one of the two"
            )
        each = encoder.num_layers // num_exits
        return cls(encoder, tuple(range(each, encoder.num_layers + 1, each)), own_heads)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers before each exit."""
        return self.exits

    @property
    def vocab_size(self) -> int:
        """Tokens of every head."""
        return self.encoder.vocab_size

    @property
    def width(self) -> int:
        """Model width d."""
        return self.encoder.width

    @property
    def frame_seconds(self) -> float:
        """Duration of one encoder frame."""
        return self.encoder.frame_seconds

    def num_frames(self, num_samples: int) -> int:
        """Encoder frames of an utterance of so many samples at 16 kHz."""
        return self.encoder.num_frames(num_samples)


class LayerGroup(nnx.Module):
    """The layers between two exits, one after another.

    Attributes:
        layers: `EncoderLayer`s; `layers[i].mixer` is the slot for attention or what replaces it.
    """

    def __init__(self, layers: Sequence[EncoderLayer]):
        self.layers = nnx.List(layers)

    def __call__(self, x: Frames, lengths: Lengths, key: Array | None = None) -> Frames:
        """`[b n d], [b] -> [b n d]`; dropout only when a key is given."""
        keys = (None,) * len(self.layers)
        if key is not None:
            keys = tuple(jax.random.split(key, len(keys)))
        for layer, layer_key in zip(self.layers, keys, strict=True):
            x = layer(x, lengths, layer_key)
        return x


class NormHead(nnx.Module):
    """`W LN(x) + b`, or `W x + b` where the layers end with a norm.

    Attributes:
        norm: layer norm or None.
        output: linear layer `d -> v`.
    """

    def __init__(self, norm: nnx.LayerNorm | None, output: nnx.Linear):
        self.norm, self.output = nnx.data(norm), output

    def __call__(self, x: Frames, lengths: Lengths) -> Logits:
        """`[b n d], [b] -> [b n v]`, unnormalised."""
        return self.output(x if self.norm is None else self.norm(x))


class Wav2Vec2Exits(nnx.Module):
    """A `Wav2Vec2` that can be left early; `EarlyExit`, `exit_objective` and `ExitDecoder` take it.

    With the shared head, an encoder that was trained with intermediate CTC losses through its head (such as the
    teachers of `experiments.lpa_librispeech`) has its exits already. Of own heads the last is the encoder's; the
    others start as copies of it, to be trained. The norm before the heads is the encoder's own for all.

    Args:
        encoder: with attention or anything else in its mixers; held, not copied.
        exits: the layers, from 1, after which there is one, ascending; the last layer is always one.
        own_heads: a linear layer for every exit instead of one for all.

    Attributes:
        config: of the encoder, and the exits.
        encoder: the model.
        blocks: a `LayerGroup` for every exit.
        heads: a `NormHead` for every exit.

    Raises:
        InputError: see `Wav2Vec2ExitsConfig`.
    """

    def __init__(self, encoder: Wav2Vec2, exits: Sequence[int], *, own_heads: bool = False):
        last = len(encoder.layers)
        exits = tuple(exits) if last in exits else (*exits, last)
        self.config = Wav2Vec2ExitsConfig(encoder.config, exits, own_heads)
        self.encoder = encoder
        norm = encoder.norm if encoder.config.norm_first else None
        starts = (0, *exits[:-1])
        self.blocks = nnx.List(
            LayerGroup(encoder.layers[start:end]) for start, end in zip(starts, exits, strict=True)
        )
        outputs = [nnx.clone(encoder.head) if own_heads else encoder.head for _ in exits[:-1]]
        self.heads = nnx.List(NormHead(norm, output) for output in (*outputs, encoder.head))

    @classmethod
    def create(cls, config: Wav2Vec2ExitsConfig, *, rngs: nnx.Rngs) -> "Wav2Vec2Exits":
        """A new encoder with its exits."""
        encoder = Wav2Vec2(config.encoder, rngs=rngs)
        return cls(encoder, config.exits, own_heads=config.own_heads)

    def embed(
        self, audio: Audio, audio_lengths: Lengths, key: Array | None = None
    ) -> tuple[Frames, Lengths]:
        """Audio to the input of the first layer: `[b t], [b] -> [b n d], [b]`; see `Wav2Vec2.embed`."""
        keys = (None, None) if key is None else jax.random.split(key)
        return self.encoder.embed(audio, audio_lengths, *keys)

    def __call__(
        self, audio: Audio, audio_lengths: Lengths, key: Array | None = None
    ) -> ExitOutput:
        """Audio to the logits of every exit; arguments as of `Wav2Vec2`."""
        return run_exits(self, audio, audio_lengths, key)
