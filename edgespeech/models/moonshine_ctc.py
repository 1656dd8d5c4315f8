"""A CTC head on Moonshine's encoder (ours): a recogniser in one pass whose encoder was pretrained on speech."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.models.moonshine import Moonshine
from edgespeech.models.moonshine_encoder import MoonshineEncoder, MoonshineEncoderConfig
from edgespeech.models.wav2vec2 import CTCOutput
from edgespeech.ops.features import SpecAugmentConfig, time_spans
from edgespeech.types import Array, Audio, Frames, Lengths, Logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoonshineCTCConfig(MoonshineEncoderConfig):
    """Sizes of the encoder, which are moonshine-base's by default, and of its head.

    Attributes:
        vocab_size: tokens of the head, the blank at 0 included.
        spec_augment: time masks on frames of 24 ms, in training; the masks of frequencies are not used.

    Raises:
        InputError: a value is out of range.
    """

    vocab_size: int = 32
    spec_augment: SpecAugmentConfig = dataclasses.field(
        default_factory=lambda: SpecAugmentConfig(time_mask_rate=0.015, time_width=12)
    )

    def __post_init__(self):
        super().__post_init__()
        if self.vocab_size < 1:
            raise InputError(f"model.vocab_size is {self.vocab_size}: it must be at least 1")

    @classmethod
    def base(cls) -> "MoonshineCTCConfig":
        """The encoder of moonshine-base: 20,166,464 parameters with the 32-character head."""
        return cls()

    @classmethod
    def tiny(cls) -> "MoonshineCTCConfig":
        """The encoder of moonshine-tiny: 7,690,496 parameters with the 32-character head."""
        return cls(width=288, num_layers=6, ffn_width=1152, rotary_factor=0.9)


class MoonshineCTC(MoonshineEncoder):
    """Moonshine's encoder with a CTC head, `logits = W norm(x) + b`.

    Attributes:
        head: linear layer `d -> v`.
    """

    def __init__(self, config: MoonshineCTCConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.config = config
        self.head = nnx.Linear(config.width, config.vocab_size, rngs=rngs)

    def __call__(self, audio: Audio, audio_lengths: Lengths, key: Array | None = None) -> CTCOutput:
        """Audio to logits.

        Args:
            audio: `[b t]`, float32 in [-1, 1], 16 kHz.
            audio_lengths: `[b]`, valid samples; an utterance's output does not depend on what is beyond.
            key: a random key: training, with time masks. None: inference.

        Raises:
            InputError: the batch is too short for a frame. A row of it that is too short has 0 frames.
        """
        x, lengths = self.embed(audio, audio_lengths)
        if key is not None:
            masked = time_spans(key, lengths, x.shape[1], self.config.spec_augment)
            x = jnp.where(masked[..., None], 0.0, x)
        memory, lengths, hidden = self.run_encoder(x, lengths)
        return CTCOutput(self.head(memory), lengths, hidden)

    def logits(self, hidden: Frames) -> Logits:
        """The head on the output of any layer, `[b n d] -> [b n v]`."""
        return self.head(self.norm(hidden))


def encoder_of(model: Moonshine, rngs: nnx.Rngs, vocab_size: int = 32) -> MoonshineCTC:
    """The encoder of a Moonshine, its arrays copied, under a new head.

    Args:
        model: gives the encoder, whatever its mixers are.
        rngs: of the head.
        vocab_size: see `MoonshineCTCConfig`.
    """
    sizes = {
        f.name: getattr(model.config, f.name) for f in dataclasses.fields(MoonshineEncoderConfig)
    }
    new = MoonshineCTC(MoonshineCTCConfig(**sizes, vocab_size=vocab_size), rngs=rngs)
    for name in ("front_end", "layers", "norm"):
        graphdef, state = nnx.split(getattr(model, name))
        setattr(new, name, nnx.merge(graphdef, jax.tree.map(jnp.copy, state)))
    return new
