"""Conversion of an encoder-decoder: cross-entropy of the tokens, and the teacher's distribution of every token."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from edgespeech.conversion.distil import DistilConfig
from edgespeech.conversion.task import Prediction, kl_divergence
from edgespeech.data.batching import Batch
from edgespeech.models.moonshine import decoder_input
from edgespeech.ops.cross_entropy import token_cross_entropy
from edgespeech.ops.mask import mask_from_lengths
from edgespeech.training.ctc import weighted_mean
from edgespeech.types import Array, Int, Lengths, Scalar


@dataclasses.dataclass(frozen=True)
class Seq2SeqDistilConfig(DistilConfig):
    """The settings of `DistilConfig`, with windows for a large pretrained model, and the weight of the cross-entropy.

    Attributes:
        cross_entropy: weight of the cross-entropy of the labels, nats per token.
    """

    steps_per_layer: int = 200
    learning_rate: float = 5e-4
    cross_entropy: float = 1.0


@dataclasses.dataclass(frozen=True)
class Seq2SeqTask:
    """The `Task` of models that return a `MoonshineOutput`, with teacher forcing.

        cross_entropy = -sum_i log p(y_i | y_<i, audio) / u
        kl            =  sum_i KL(teacher_i || student_i) / u

    y are the targets and the end token, u as many. Only layers with a mixer are replaced and adapt: the decoder has
    none, and is the teacher's.

    Attributes:
        bos_id: the token that a text begins with.
        eos_id: the token that ends it; targets come without.
    """

    bos_id: int
    eos_id: int

    def labels(self, batch: Batch) -> tuple[Int[Array, "b u"], Lengths]:
        """What the decoder is to predict, and how much of it is valid: the targets, each with an end token."""
        targets = jnp.pad(batch.targets, ((0, 0), (0, 1)))
        at_end = jnp.arange(targets.shape[1]) == batch.target_lengths[:, None]
        return jnp.where(at_end, self.eos_id, targets), batch.target_lengths + 1

    def forward(self, model: Any, batch: Batch) -> Prediction:
        """See `Task`."""
        labels, lengths = self.labels(batch)
        tokens = decoder_input(labels, self.bos_id)
        output = model(batch.audio, batch.audio_lengths, tokens, lengths)
        return Prediction(output.logits, output.lengths, output.hidden)

    def terms(self, student: Prediction, teacher: Prediction, batch: Batch) -> dict[str, Scalar]:
        """See `Task`."""
        labels, lengths = self.labels(batch)
        mask = mask_from_lengths(lengths, labels.shape[1])
        cross_entropy = token_cross_entropy(student.logits, labels, lengths) / lengths
        kl = kl_divergence(teacher.logits, student.logits, mask) / lengths
        return {
            "cross_entropy": weighted_mean(cross_entropy, batch.weights),
            "kl": weighted_mean(kl, batch.weights),
        }
