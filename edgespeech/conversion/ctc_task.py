"""Conversion of a CTC model: its loss on the targets, and the teacher's distribution at every frame."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from edgespeech.conversion.distil import DistilConfig
from edgespeech.conversion.task import Prediction, kl_divergence
from edgespeech.data.batching import Batch
from edgespeech.ops.mask import mask_from_lengths
from edgespeech.training.ctc import ctc_per_token, weighted_mean
from edgespeech.types import Scalar


@dataclasses.dataclass(frozen=True)
class CTCDistilConfig(DistilConfig):
    """The settings of `DistilConfig`, and the weight of the CTC loss.

    Attributes:
        ctc: weight of the CTC loss, nats per token.
    """

    ctc: float = 1.0


class CTCTask:
    """The `Task` of models that return a `CTCOutput`.

    ctc = CTC / u;   kl = sum_i KL(teacher_i || student_i) / u,   u tokens of an utterance, i its frames
    """

    def forward(self, model: Any, batch: Batch) -> Prediction:
        """See `Task`."""
        output = model(batch.audio, batch.audio_lengths)
        return Prediction(output.logits, output.lengths, output.hidden)

    def terms(self, student: Prediction, teacher: Prediction, batch: Batch) -> dict[str, Scalar]:
        """See `Task`."""
        ctc = ctc_per_token(student.logits, student.lengths, batch)
        mask = mask_from_lengths(student.lengths, student.logits.shape[1])
        mask = mask & (batch.weights > 0)[:, None]
        tokens = jnp.maximum(batch.target_lengths, 1)
        kl = kl_divergence(teacher.logits, student.logits, mask) / tokens
        return {
            "ctc": weighted_mean(ctc, batch.weights),
            "kl": weighted_mean(kl, batch.weights),
        }
