"""The objective of a model with exits."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from edgespeech.data.batching import Batch
from edgespeech.errors import InputError
from edgespeech.nn.exits import exit_loss
from edgespeech.training.ctc import weighted_mean
from edgespeech.training.state import StatefulLossFunction


@dataclasses.dataclass(frozen=True)
class ExitLossConfig:
    """What the exits are trained for together; the defaults are the papers' (arXiv 2309.09546, 2506.18035).

    Attributes:
        weights: of the exits' CTC losses, one an exit, at least 0 and not all 0; none: all 1.
        distillation: weight of the divergence of every exit from the last one, at least 0.
        temperature: of that divergence, above 0.

    Raises:
        InputError: a value is out of range.
    """

    weights: tuple[float, ...] = ()
    distillation: float = 0.0
    temperature: float = 1.0

    def __post_init__(self):
        if self.weights and (min(self.weights) < 0 or max(self.weights) == 0):
            raise InputError(f"weights are {self.weights}: they must be at least 0 and not all 0")
        if not self.distillation >= 0:
            raise InputError(f"distillation is {self.distillation}: it must be at least 0")
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}: it must be above 0")


def exit_objective(graphdef: nnx.GraphDef, config: ExitLossConfig) -> StatefulLossFunction:
    """`mean_b (sum_m w_m CTC_m + distillation * sum_m KL_m) / tokens`: see `exit_loss`; division by tokens is ours.

    Args:
        graphdef: of a model that returns an `ExitOutput`; its state is split into `nnx.Param`, which is trained, and
            `nnx.BatchStat`, which the state of the training carries as its `extra`.
        config: see `ExitLossConfig`.
    """

    def loss(params, batch: Batch, key, step, statistics):
        del step
        model = nnx.merge(graphdef, params, statistics, copy=True)
        # A filler row has no frame: its silence is not part of a batch norm's statistics.
        lengths = jnp.where(batch.weights > 0, batch.audio_lengths, 0)
        output = model(batch.audio, lengths, key)
        losses = exit_loss(
            output.exit_logits,
            output.lengths,
            batch.targets,
            batch.target_lengths,
            weights=config.weights or None,
            distillation=config.distillation,
            temperature=config.temperature,
        )
        value = weighted_mean(losses / jnp.maximum(batch.target_lengths, 1), batch.weights)
        return value, {}, nnx.state(model, nnx.BatchStat)

    return loss
