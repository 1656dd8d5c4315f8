"""Progressive replacement with distillation: the schedule, and what is minimised.

Layers are replaced one at a time in the sweep's order, each starting from its sweep weights and given a window of
`steps_per_layer` steps in three phases (ours, after the digest of arXiv 2603.16922 that names the parts):

    (a) the replacement alone learns           first 0.3 of the window
    (b) with the feed-forward and the norms of all replaced layers ("FFN co-adaptation")
    (c) the same with hard gates, straight through       from 0.6 on

A layer that has passed its window stays hard and goes on learning with those that follow.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.flatten_util import ravel_pytree

from edgespeech.conversion.layers import mixer_layers
from edgespeech.data.batching import Batch
from edgespeech.nn.lpa import anneal
from edgespeech.ops.ctc import ctc_log_probs
from edgespeech.ops.mask import mask_from_lengths
from edgespeech.training.ctc import ctc_per_token, weighted_mean
from edgespeech.training.state import LossFunction
from edgespeech.types import Array, Bool, Float, Frames, Logits, Scalar

CO_ADAPT_FROM = 0.3
HARD_FROM = 0.6


@dataclasses.dataclass(frozen=True)
class DistilConfig:
    """Weights of the three terms of the loss, and the length of the windows.

    Attributes:
        steps_per_layer: updates from one replaced layer to the next.
        learning_rate: peak of each window, which decays by a cosine to a tenth.
        ctc: weight of the CTC loss, nats per token.
        kl: weight of KL(teacher || student) over the logits, nats per token.
        hidden: weight of the relative MSE of the outputs of the replaced layers.
        co_adapt: train the feed-forward and norms of replaced layers as well (phase b).
    """

    steps_per_layer: int = 36
    learning_rate: float = 1e-3
    ctc: float = 1.0
    kl: float = 1.0
    hidden: float = 1.0
    co_adapt: bool = True

    def __post_init__(self):
        if self.steps_per_layer < 1:
            raise ValueError(f"steps_per_layer is {self.steps_per_layer}: it must be at least 1")
        for name in ("ctc", "kl", "hidden"):
            if getattr(self, name) < 0:
                raise ValueError(f"distil.{name} is {getattr(self, name)}: it must be at least 0")
        if self.learning_rate <= 0:
            raise ValueError(f"distil.learning_rate is {self.learning_rate}: it must be above 0")

    def schedule(self, step: Array) -> Scalar:
        """Learning rate: a cosine from the peak to a tenth of it in every window."""
        phase = (step % self.steps_per_layer) / self.steps_per_layer
        return self.learning_rate * (0.55 + 0.45 * jnp.cos(jnp.pi * phase))


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
    return Windows(
        active,
        active & (elapsed >= _first_step(CO_ADAPT_FROM, config)) & config.co_adapt,
        active & (elapsed >= _first_step(HARD_FROM, config)),
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
        logits: `[b n v]` of the teacher.
        hidden: the output `[b n d]` of each of its layers.
        frozen: state of the student that is not trained. It travels with the batch: constants in a compiled
            program would be folded into it.
    """

    batch: Batch
    logits: Logits
    hidden: tuple[Frames, ...]
    frozen: nnx.State


def distil_objective(
    graphdef: nnx.GraphDef, order: tuple[int, ...], config: DistilConfig
) -> LossFunction:
    """The loss of the student.

        loss = w_ctc CTC / u + w_kl sum_i KL(teacher_i || student_i) / u + w_hidden mean_l MSE(h_l) / var(h_l)

    with u the tokens of an utterance, i its frames and l the replaced layers.

    Args:
        graphdef: of a model with switches that returns a `CTCOutput`, split by `trainable`.
        order: layers to replace, from 0.
        config: see `DistilConfig`.
    """

    def loss(params, lesson: Lesson, key, step):
        del key
        batch = lesson.batch
        student = nnx.merge(graphdef, params, lesson.frozen, copy=True)
        state = windows(order, len(lesson.hidden), step, config)
        apply_windows(student, state)
        output = student(batch.audio, batch.audio_lengths)
        mask = (
            mask_from_lengths(output.lengths, output.logits.shape[1]) & (batch.weights > 0)[:, None]
        )

        ctc = weighted_mean(ctc_per_token(output.logits, output.lengths, batch), batch.weights)
        teacher, student_log = ctc_log_probs(lesson.logits), ctc_log_probs(output.logits)
        frame_kl = jnp.sum(jnp.exp(teacher) * (teacher - student_log), -1)
        tokens = jnp.maximum(batch.target_lengths, 1)
        kl = weighted_mean(jnp.sum(jnp.where(mask, frame_kl, 0.0), 1) / tokens, batch.weights)
        hidden = jnp.stack(
            [_relative_mse(h, t, mask) for h, t in zip(output.hidden, lesson.hidden, strict=True)]
        )
        hidden = jnp.sum(jnp.where(state.active, hidden, 0.0)) / jnp.maximum(
            jnp.sum(state.active), 1
        )
        total = config.ctc * ctc + config.kl * kl + config.hidden * hidden
        return total, {"ctc": ctc, "kl": kl, "hidden": hidden}

    return loss


def _relative_mse(student: Frames, teacher: Frames, mask) -> Scalar:
    mask = mask[..., None]
    count = jnp.maximum(jnp.sum(mask), 1) * teacher.shape[-1]
    teacher = jnp.where(mask, teacher, 0.0)
    mean = jnp.sum(teacher) / count
    variance = jnp.sum(jnp.where(mask, jnp.square(teacher - mean), 0.0)) / count
    error = jnp.sum(jnp.where(mask, jnp.square(student - teacher), 0.0)) / count
    return error / (variance + 1e-6)
