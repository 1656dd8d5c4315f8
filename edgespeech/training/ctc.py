"""The objectives of a CTC model: what is minimised to train a teacher, or the head of one alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.data.batching import Batch
from edgespeech.ops.ctc import ctc_loss
from edgespeech.training.state import LossFunction
from edgespeech.types import Array, Float, Frames, Lengths, Scalar


def weighted_mean(values: Float[Array, "b"], weights: Float[Array, "b"]) -> Scalar:
    """`sum(w x) / max(sum(w), 1)`: filler rows have weight 0."""
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def ctc_per_token(logits, lengths, batch: Batch) -> Float[Array, "b"]:
    """CTC loss of each utterance divided by its number of tokens, nats."""
    loss = ctc_loss(logits, lengths, batch.targets, batch.target_lengths)
    return loss / jnp.maximum(batch.target_lengths, 1)


def ctc_objective(
    graphdef: nnx.GraphDef,
    intermediate_layers: tuple[int, ...] = (),
    intermediate_weight: float = 0.3,
) -> LossFunction:
    """CTC at the last layer, and at intermediate ones through the same head (Lee and Watanabe, 2021, arXiv 2102.03216).

        loss = (1 - w) ctc(last) + w mean ctc(intermediate)

    Args:
        graphdef: of a model that returns a `CTCOutput` and has `logits(hidden, lengths)`; all its state is trained.
        intermediate_layers: counted from 1.
        intermediate_weight: w; not used without intermediate layers.
    """

    def loss(params, batch: Batch, key, step):
        del step
        model = nnx.merge(graphdef, params, copy=True)
        output = model(batch.audio, batch.audio_lengths, key)
        last = weighted_mean(ctc_per_token(output.logits, output.lengths, batch), batch.weights)
        if not intermediate_layers:
            return last, {"ctc": last}
        others = [
            weighted_mean(
                ctc_per_token(
                    model.logits(output.hidden[layer - 1], output.lengths), output.lengths, batch
                ),
                batch.weights,
            )
            for layer in intermediate_layers
        ]
        middle = sum(others[1:], others[0]) / len(others)
        total = (1.0 - intermediate_weight) * last + intermediate_weight * middle
        return total, {"ctc": last, "ctc_intermediate": middle}

    return loss


class Heard(NamedTuple):
    """A batch with what a frozen encoder makes of it.

    Attributes:
        batch: audio and targets.
        hidden: `[b n d]`, the output of the last layer.
        lengths: `[b]`, valid frames.
        encoder: state of all but the head. It travels with the batch: constants in a compiled program would be folded
            into it.
    """

    batch: Batch
    hidden: Frames
    lengths: Lengths
    encoder: nnx.State


def head_objective(
    model: nnx.Module,
) -> tuple[nnx.State, LossFunction, Callable[[Batch], Heard]]:
    """What trains the `head` of a model on its frozen encoder, without augmentation.

    A head that starts at random would drag a pretrained encoder onto the plateau where only blanks are predicted.

    Args:
        model: as for `ctc_objective`.

    Returns:
        The head's parameters, their loss, and what turns a batch into the loss's input.
    """
    graphdef, head, encoder = nnx.split(model, lambda path, _: path[0] == "head", ...)
    listen = jax.jit(
        lambda encoder, batch: nnx.merge(graphdef, head, encoder)(batch.audio, batch.audio_lengths)
    )

    def prepare(batch: Batch) -> Heard:
        output = listen(encoder, batch)
        return Heard(batch, output.hidden[-1], output.lengths, encoder)

    def loss(head, heard: Heard, key, step):
        del key, step
        whole: Any = nnx.merge(graphdef, head, heard.encoder, copy=True)
        ctc = ctc_per_token(whole.logits(heard.hidden, heard.lengths), heard.lengths, heard.batch)
        ctc = weighted_mean(ctc, heard.batch.weights)
        return ctc, {"ctc": ctc}

    return head, loss, prepare
