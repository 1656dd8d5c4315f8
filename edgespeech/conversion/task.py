"""What a conversion must know of the kind of recogniser that it converts."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from edgespeech.data.batching import Batch
from edgespeech.types import Array, Bool, Float, Frames, Lengths, Scalar


class Prediction(NamedTuple):
    """What a model makes of a batch.

    Attributes:
        logits: `[b n v]` of frames (CTC) or `[b u v]` of tokens (encoder-decoder).
        lengths: `[b]`, valid encoder frames.
        hidden: the output `[b n d]` of every layer with a mixer, in order.
    """

    logits: Float[Array, "b i v"]
    lengths: Lengths
    hidden: tuple[Frames, ...]


class Task(Protocol):
    """A kind of recogniser: how a batch goes through it, and what is asked of a student of it."""

    def forward(self, model: Any, batch: Batch) -> Prediction:
        """The model's prediction, without dropout or augmentation."""
        ...

    def terms(self, student: Prediction, teacher: Prediction, batch: Batch) -> dict[str, Scalar]:
        """The terms of the loss by the names that their weights have in the task's configuration, nats per token."""
        ...


def kl_divergence(
    teacher: Float[Array, "b i v"], student: Float[Array, "b i v"], mask: Bool[Array, "b i"]
) -> Float[Array, "b"]:
    """`sum_i KL(softmax(teacher_i) || softmax(student_i))` over the positions in the mask, in float32.

    Args:
        teacher: its logits.
        student: its logits.
        mask: True where a position counts.
    """
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (teacher, student))
    return jnp.sum(jnp.where(mask, jnp.sum(jnp.exp(p) * (p - q), -1), 0.0), 1)
