"""Progressive replacement with distillation: the schedule, and what is minimised.

Layers are replaced one at a time in the sweep's order, each starting from its sweep weights and given a window of
`steps_per_layer` steps in three phases (ours, after the digest of arXiv 2603.16922 that names the parts):

    (a) the replacement alone learns
    (b) with the feed-forward and the norms of all replaced layers ("FFN co-adaptation"), from `co_adapt_from` on
    (c) the same with hard gates, straight through, from `hard_from` on

A layer that has passed its window stays hard and goes on learning with those that follow. After the last window all
replaced layers may go on together for `joint_steps` (ours).
"""

import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.flatten_util import ravel_pytree

from edgespeech.conversion.layers import mixer_layers
from edgespeech.conversion.task import Prediction, Task
from edgespeech.data.batching import Batch
from edgespeech.nn.lpa import Init, anneal
from edgespeech.ops.mask import mask_from_lengths
from edgespeech.training.state import LossFunction, checkpoint_settings
from edgespeech.types import Array, Bool, Float, Frames, Scalar

_NEWER = ("co_adapt_from", "hard_from", "curriculum", "init", "joint_steps", "final_rate")
# Fields that are no weights of terms.
_SCHEDULE = ("steps_per_layer", "learning_rate", "co_adapt", *_NEWER)


@dataclasses.dataclass(frozen=True)
class DistilConfig:
    """Length of the windows, and weights of the terms of the loss; a task's own configuration adds its terms.

    Attributes:
        steps_per_layer: updates from one replaced layer to the next.
        learning_rate: peak of each window, which decays by a cosine to a tenth.
        kl: weight of KL(teacher || student) over the logits, nats per token.
        hidden: weight of the relative MSE of the outputs of the replaced layers.
        co_adapt: train the feed-forward and norms of replaced layers as well (phase b).
        co_adapt_from: part of its window, in [0, 1], after which a layer's phase (b) begins.
        hard_from: part of its window, in [0, 1], after which a layer's gates are hard (phase c).
        curriculum: temperatures fall and then gates harden, in the sweep and in each window. Off: the least temperature
            and hard gates, straight through, from the first step of both.
        init: what an LPA starts from in the sweep: value and output projections of the attention; those, and readout
            and local path fitted to its outputs (fit); or random values.
        joint_steps: updates after the last window, in which all replaced layers learn together with hard gates.
        final_rate: last learning rate of those over the peak, in [0, 1]; they start at the peak and fall by a cosine.
    """

    steps_per_layer: int = 36
    learning_rate: float = 1e-3
    kl: float = 1.0
    hidden: float = 1.0
    co_adapt: bool = True
    co_adapt_from: float = 0.3
    hard_from: float = 0.6
    curriculum: bool = True
    init: Init = "attention"
    joint_steps: int = 0
    final_rate: float = 0.01

    def __post_init__(self):
        if self.steps_per_layer < 1:
            raise ValueError(f"steps_per_layer is {self.steps_per_layer}: it must be at least 1")
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"distil.{name} is {weight}: it must be at least 0")
        if self.learning_rate <= 0:
            raise ValueError(f"distil.learning_rate is {self.learning_rate}: it must be above 0")
        for name in ("co_adapt_from", "hard_from", "final_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"distil.{name} is {getattr(self, name)}: it must be in [0, 1]")
        if self.init not in get_args(Init):
            raise ValueError(f"distil.init is {self.init!r}: choose one of {get_args(Init)}")
        if self.joint_steps < 0:
            raise ValueError(f"distil.joint_steps is {self.joint_steps}: it must be at least 0")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every term of the loss, by its name."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in _SCHEDULE]
        return {name: getattr(self, name) for name in names}

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must have been made with, plain JSON."""
        return checkpoint_settings(self, _NEWER)

    def num_steps(self, count: int, most: int) -> int:
        """Updates until `count` of `most` layers are replaced; the joint ones belong to the last."""
        return count * self.steps_per_layer + (self.joint_steps if count == most else 0)

    def schedule(self, step: Array, most: int) -> Scalar:
        """Learning rate: a cosine from the peak to a tenth of it in every window, to `final_rate` of it after the last.

        Args:
            step: int32 scalar.
            most: layers that are replaced in all, each with its window.
        """
        phase = (step % self.steps_per_layer) / self.steps_per_layer
        rate = self.learning_rate * (0.55 + 0.45 * jnp.cos(jnp.pi * phase))
        if not self.joint_steps:
            return rate
        after = step - most * self.steps_per_layer
        phase = jnp.clip(after / self.joint_steps, 0.0, 1.0)
        fall = self.final_rate + (1.0 - self.final_rate) * 0.5 * (1.0 + jnp.cos(jnp.pi * phase))
        return jnp.where(after < 0, rate, self.learning_rate * fall)


class Windows(NamedTuple):
    """What the schedule says of each layer at one step.

    Attributes:
        active: the replacement is in use, and learns.
        co_adapting: feed-forward and norms learn.
        hard: its gates are binary.
    """

    active: Bool[Array, "l"]
    co_adapting: Bool[Array, "l"]
    hard: Bool[Array, "l"]


def windows(order: tuple[int, ...], num_layers: int, step: Array, config: DistilConfig) -> Windows:
    """The state of every layer at a step.

    Args:
        order: the layers to replace, from 0, first to last; the others stay as they are.
        num_layers: of the model.
        step: int32 scalar.
        config: see `DistilConfig`.
    """
    never = len(order) + 1
    rank = jnp.asarray([order.index(i) if i in order else never for i in range(num_layers)])
    elapsed = step - rank * config.steps_per_layer
    # Layers outside the order never become active, however long a run goes on.
    active = (elapsed >= 0) & (rank < never)
    hard_from = config.hard_from if config.curriculum else 0.0
    # Each part is at most a whole window: in the joint steps all are in their last phase.
    return Windows(
        active,
        active & (elapsed >= _first_step(config.co_adapt_from, config)) & config.co_adapt,
        active & (elapsed >= _first_step(hard_from, config)),
    )


def _first_step(part: float, config: DistilConfig) -> int:
    """The first step of a window at or after a part of it."""
    # Whole steps: compiled, a quotient may round to just below the part and shift a phase by a step.
    return math.ceil(part * config.steps_per_layer - 1e-9)


def apply_windows(model: nnx.Module, state: Windows) -> None:
    """Sets the flags and the annealing of a model with switches, in place, inside jit."""
    for index, layer in enumerate(mixer_layers(model).values()):
        layer.mixer.active[...] = state.active[index]
        # The sweep has been through the temperatures: a replacement arrives cold.
        anneal(layer.mixer, jnp.ones(()), state.hard[index].astype(jnp.float32))


def trainable(model: nnx.Module):
    """A filter for `nnx.split`: the parameters of replacements, and of layers outside their mixers."""
    paths = [tuple(path) for path in mixer_layers(model)]

    def select(path, value) -> bool:
        if not isinstance(value, nnx.Param):
            return False
        for prefix in paths:
            if path[: len(prefix)] == prefix:
                inside = path[len(prefix) :]
                return inside[0] != "mixer" or inside[1] == "replacement"
        return False

    return select


def trained_mask(params: nnx.State, model: nnx.Module, order, config: DistilConfig):
    """`step -> [w]` for `make_step`: which of the raveled trainable parameters learn at a step."""
    paths = [tuple(path) for path in mixer_layers(model)]

    def mask(step: Array) -> Float[Array, "w"]:
        state = windows(order, len(paths), step, config)

        def leaf(path, value):
            keys = tuple(
                getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path
            )
            for index, prefix in enumerate(paths):
                if keys[: len(prefix)] == prefix:
                    which = state.active if keys[len(prefix)] == "mixer" else state.co_adapting
                    return jnp.full(value.shape, which[index], jnp.float32)
            raise AssertionError(f"{keys} is in no layer")

        return ravel_pytree(jax.tree_util.tree_map_with_path(leaf, params))[0]

    return mask


class Lesson(NamedTuple):
    """A batch with what the teacher makes of it, and the student's frozen parameters.

    Attributes:
        batch: audio and targets.
        teacher: its prediction.
        frozen: state of the student that is not trained. It travels with the batch: constants in a compiled
            program would be folded into it.
    """

    batch: Batch
    teacher: Prediction
    frozen: nnx.State


def distil_objective(
    graphdef: nnx.GraphDef, task: Task, order: tuple[int, ...], config: DistilConfig
) -> LossFunction:
    """The loss of the student.

        loss = sum_k w_k term_k + w_hidden mean_l MSE(h_l) / var(h_l)

    with the terms of the task and l the replaced layers.

    Args:
        graphdef: of a model with switches, split by `trainable`.
        task: of the model.
        order: layers to replace, from 0.
        config: see `DistilConfig`.
    """

    def loss(params, lesson: Lesson, key, step):
        del key
        batch = lesson.batch
        student = nnx.merge(graphdef, params, lesson.frozen, copy=True)
        state = windows(order, len(lesson.teacher.hidden), step, config)
        apply_windows(student, state)
        output = task.forward(student, batch)
        terms = task.terms(output, lesson.teacher, batch)
        n = output.hidden[0].shape[1]
        mask = mask_from_lengths(output.lengths, n) & (batch.weights > 0)[:, None]
        pairs = zip(output.hidden, lesson.teacher.hidden, strict=True)
        hidden = jnp.stack([_relative_mse(h, t, mask) for h, t in pairs])
        hidden = jnp.sum(jnp.where(state.active, hidden, 0.0)) / jnp.maximum(
            jnp.sum(state.active), 1
        )
        terms["hidden"] = hidden
        total = functools.reduce(
            operator.add, (config.weights[name] * term for name, term in terms.items())
        )
        return total, terms

    return loss


def _relative_mse(student: Frames, teacher: Frames, mask) -> Scalar:
    mask = mask[..., None]
    count = jnp.maximum(jnp.sum(mask), 1) * teacher.shape[-1]
    teacher = jnp.where(mask, teacher, 0.0)
    mean = jnp.sum(teacher) / count
    variance = jnp.sum(jnp.where(mask, jnp.square(teacher - mean), 0.0)) / count
    error = jnp.sum(jnp.where(mask, jnp.square(student - teacher), 0.0)) / count
    return error / (variance + 1e-6)
