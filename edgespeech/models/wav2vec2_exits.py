"""A wav2vec2 encoder with early exits: a CTC head, shared or its own, after chosen layers."""

from collections.abc import Sequence

import jax
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.models.splitformer import ExitOutput, run_exits
from edgespeech.models.wav2vec2 import Wav2Vec2
from edgespeech.nn.transformer import EncoderLayer
from edgespeech.types import Array, Audio, Frames, Lengths, Logits


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
        encoder: the model.
        blocks: a `LayerGroup` for every exit.
        heads: a `NormHead` for every exit.

    Raises:
        InputError: exits are not ascending layers of the encoder, or its padding is `upstream`, where an utterance
            alone differs from one in a batch.
    """

    def __init__(self, encoder: Wav2Vec2, exits: Sequence[int], *, own_heads: bool = False):
        last = len(encoder.layers)
        exits = tuple(exits) if last in exits else (*exits, last)
        if list(exits) != sorted(set(exits)) or not 1 <= exits[0] <= exits[-1] == last:
            raise InputError(
                f"exits are {exits}: give ascending layers of the encoder, from 1 to {last}"
            )
        if encoder.config.padding != "exact":
            raise InputError(
                "model.padding is 'upstream': exits regroup batches, which asks for 'exact'"
            )
        self.encoder = encoder
        self.exits = exits
        norm = encoder.norm if encoder.config.norm_first else None
        starts = (0, *exits[:-1])
        self.blocks = nnx.List(
            LayerGroup(encoder.layers[start:end]) for start, end in zip(starts, exits, strict=True)
        )
        outputs = [nnx.clone(encoder.head) if own_heads else encoder.head for _ in exits[:-1]]
        self.heads = nnx.List(NormHead(norm, output) for output in (*outputs, encoder.head))

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
