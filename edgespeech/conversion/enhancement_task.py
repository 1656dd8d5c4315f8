"""Conversion of a SepFormer: SI-SNR to the clean voice and to the teacher's estimate, intra-chunk layers alone."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from edgespeech.conversion.distil import DistilConfig
from edgespeech.conversion.run import Teacher
from edgespeech.conversion.sweep import Pairs
from edgespeech.conversion.task import Prediction
from edgespeech.data.mixtures import MixtureBatch
from edgespeech.models.sepformer import SepFormer
from edgespeech.nn.dual_path import chunk_count
from edgespeech.ops.sisnr import si_snr_loss
from edgespeech.types import Scalar


@dataclasses.dataclass(frozen=True)
class EnhancementDistilConfig(DistilConfig):
    """The settings of `DistilConfig`, and the weights of what replaces the KL divergence, which estimates have not.

    Attributes:
        kl: always 0.
        si_snr: weight of the negative SI-SNR to the clean voices, dB.
        teacher: weight of the negative SI-SNR to the teacher's estimates, dB.
    """

    steps_per_layer: int = 8
    kl: float = 0.0
    si_snr: float = 0.1
    teacher: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        if self.kl:
            raise ValueError(f"distil.kl is {self.kl}: estimates are no distributions, leave it 0")


class Sealed(nnx.Module):
    """A module whose layers a conversion does not find: attention across chunks stays attention.

    Attributes:
        graphdef: of the module.
        state: its parameters.
    """

    def __init__(self, module: nnx.Module):
        self.graphdef, state = nnx.split(module)
        self.state = nnx.data(state)

    def __call__(self, *inputs, **settings):
        """What the module makes of the inputs."""
        return self.opened()(*inputs, **settings)

    def opened(self) -> Any:
        """The module."""
        return nnx.merge(self.graphdef, self.state)


def seal_inter_chunk_layers(model: SepFormer) -> SepFormer:
    """A copy in which `mixer_layers` finds the intra-chunk layers alone; its outputs are the model's."""
    model = nnx.clone(model)
    for block in model.mask_network.blocks:
        block.inter = Sealed(block.inter)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def unseal_inter_chunk_layers(model: SepFormer) -> SepFormer:
    """A copy of a model with sealed layers, as it was before `seal_inter_chunk_layers`."""
    model = nnx.clone(model)
    for block in model.mask_network.blocks:
        block.inter = block.inter.opened()  # pyright: ignore[reportAttributeAccessIssue]
    return model


class EnhancementTask:
    """The `Task` of SepFormer.

        si_snr  = mean_b -SI-SNR(student_b, clean_b)
        teacher = mean_b -SI-SNR(student_b, teacher_b)

    Both with the threshold of `si_snr_loss`. The prediction's logits are the estimates `[b spk t]`, and its frames all
    positions of an utterance's chunks, `[b s*k d]`, those in the zeros around it included, as the layers see them.
    """

    def forward(self, model: Any, batch: Any) -> Prediction:
        """See `Task`; the batch is a `MixtureBatch`."""
        # The stages of a conversion set `scan_layers` on the model itself, as wav2vec2 has it.
        model.mask_network.scan_layers = getattr(model, "scan_layers", False)
        output = model(batch.audio, batch.audio_lengths)
        b, d = len(batch.audio), model.config.width
        k = model.config.chunk_length
        hidden = tuple(layer.reshape(b, -1, d) for layer in output.hidden)
        return Prediction(output.estimates, k * chunk_count(output.lengths, k), hidden)

    def terms(self, student: Prediction, teacher: Prediction, batch: Any) -> dict[str, Scalar]:
        """See `Task`, in dB."""
        lengths, weights = batch.audio_lengths, batch.weights
        return {
            "si_snr": si_snr_loss(student.logits, batch.targets, lengths, weights),
            "teacher": si_snr_loss(student.logits, teacher.logits, lengths, weights),
        }


class EnhancementTeacher(Teacher):
    """A SepFormer to convert.

    Attributes:
        plain: the model as it was given; `model` has its inter-chunk layers sealed.
    """

    def __init__(self, model: SepFormer):
        self.plain = model
        super().__init__(seal_inter_chunk_layers(model), EnhancementTask())

    def pairs(self, batch: MixtureBatch) -> Pairs:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Teacher`; a row is a chunk, `[l b*s k d]`."""
        config = self.plain.config
        chunks = chunk_count(config.num_frames(batch.audio.shape[1]), config.chunk_length)
        weights = jnp.repeat(batch.weights, chunks)
        return super().pairs(batch._replace(weights=weights))  # pyright: ignore[reportArgumentType]
