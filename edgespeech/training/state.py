"""What a training run carries from step to step, the optimiser, and the pure step function."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from edgespeech.training.sharding import gather, scatter, split_columns
from edgespeech.types import Array, Float, Scalar

PyTree = Any
Vector = Float[Array, "w"]


class TrainState(NamedTuple):
    """Everything that resuming needs: with the data's settings it determines the rest of a run.

    The parameters are one vector. A transformer has hundreds of arrays, and an update of each is a program of its own
    to compile; of one vector it is a single loop. `jax.flatten_util.ravel_pytree` goes there and back.

    Attributes:
        step: int32 scalar, updates done.
        params: float32 `[w]`, the trained parameters.
        average: float32 `[w]`, their exponential moving average, used for evaluation.
        optimizer: optax state.
        extra: what the loss carries on but the optimiser does not touch, such as the running statistics of batch
            norms; None where there is no such thing.
    """

    step: Array
    params: Vector
    average: Vector
    optimizer: PyTree
    extra: PyTree = None


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay.

    Attributes:
        learning_rate: its peak.
        warmup: part of the steps over which the rate rises from 0, in [0, 1].
        final_rate: last learning rate over the peak.
        weight_decay: decoupled; only for arrays of two or more axes.
        clip: largest global norm of a gradient.
        average_decay: decay of the moving average of the parameters in a step, in [0, 1); 0 keeps the last parameters.
        accumulate: steps, each of one batch, whose mean gradient makes one update; at least 1.
    """

    learning_rate: float = 1e-3
    warmup: float = 0.1
    final_rate: float = 0.01
    weight_decay: float = 0.01
    clip: float = 1.0
    average_decay: float = 0.99
    accumulate: int = 1

    def __post_init__(self):
        for name, low, high in (
            ("warmup", 0.0, 1.0),
            ("final_rate", 0.0, 1.0),
            ("average_decay", 0.0, 0.99999),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: it must be in [{low:g}, {high:g}]"
                )
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.accumulate < 1:
            raise ValueError(f"accumulate is {self.accumulate}: it must be at least 1")


def checkpoint_settings(config: Any, newer: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a configuration that a checkpoint must have been made with, by name.

    Args:
        config: a dataclass.
        newer: fields that older checkpoints do not name, because they were made with what is now the default: left out
            where they have it.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in newer or value != defaults[name]
    }


class Optimizer(NamedTuple):
    """An optax transformation that can tell its learning rate.

    Attributes:
        init, update: as in `optax.GradientTransformation`.
        learning_rate: `state -> scalar`, the rate of the next update.
    """

    init: Callable[[Any], Any]
    update: Callable[..., Any]
    learning_rate: Callable[[Any], Any]


def scheduled(
    *parts: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    accumulate: int = 1,
) -> Optimizer:
    """The parts one after another, then times `-schedule(updates done)`; the mean of `accumulate` gradients goes in."""
    chain = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
    if accumulate == 1:
        return Optimizer(*chain, lambda state: schedule(state[-1].count))
    return Optimizer(
        *optax.MultiSteps(chain, accumulate).gradient_transformation(),
        lambda state: schedule(state.inner_opt_state[-1].count),
    )


def make_optimizer(config: OptimizerConfig, steps: int, params: PyTree) -> Optimizer:
    """Clip, then AdamW (Loshchilov and Hutter, 2019; betas 0.9 and 0.98), over the vector of the params.

    Args:
        config: see `OptimizerConfig`.
        steps: of the whole run, which the schedule spans.
        params: the tree that is raveled; its arrays of one axis or none are not decayed.
    """
    decayed, _ = ravel_pytree(jax.tree.map(lambda p: jnp.full(p.shape, float(p.ndim > 1)), params))
    # At least one step on either side of the peak: the schedule takes no empty part.
    steps = max(2, steps // config.accumulate)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(max(1, int(config.warmup * steps)), steps - 1),
        steps,
        config.learning_rate * config.final_rate,
    )

    def decay(updates: Any, vector: Any) -> Any:
        return updates + config.weight_decay * decayed * vector

    return scheduled(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.stateless(decay),
        schedule=schedule,
        accumulate=config.accumulate,
    )


def init_state(
    params: PyTree, optimizer: optax.GradientTransformation | Optimizer, extra: PyTree = None
) -> TrainState:
    """State before the first step, in arrays of its own."""
    vector, _ = ravel_pytree(params)
    step = jnp.zeros((), jnp.int32)
    own_extra = jax.tree.map(jnp.copy, extra)
    return TrainState(step, vector, jnp.copy(vector), optimizer.init(vector), own_extra)


# loss(params, batch, key, step) -> (scalar, metrics), on the tree of parameters
LossFunction = Callable[[PyTree, Any, Array, Array], tuple[Scalar, dict[str, Scalar]]]
# loss(params, batch, key, step, extra) -> (scalar, metrics, new extra), where the state has an `extra`
StatefulLossFunction = Callable[
    [PyTree, Any, Array, Array, PyTree], tuple[Scalar, dict[str, Scalar], PyTree]
]
# step(state, batch, key) -> (state, metrics)
StepFunction = Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Scalar]]]


def make_step(
    loss: LossFunction | StatefulLossFunction,
    unravel: Callable[[Vector], PyTree],
    optimizer: optax.GradientTransformation | Optimizer,
    average_decay: float,
    trained: Callable[[Array], Vector] | None = None,
) -> StepFunction:
    """The update as a pure function, to be jitted once for each batch shape.

    The random key of a step is `fold_in(key, step)`: a resumed run draws the same numbers. A step whose loss or
    gradient is not finite leaves parameters, optimiser and `extra` as they were and counts itself in the metric
    `skipped`.

    Args:
        loss: returns the scalar to minimise and metrics; a state with an `extra` gives it to the loss as one more
            argument, and takes the new one as one more result.
        unravel: vector to tree, from `ravel_pytree`.
        optimizer: optax transformation of the vector; an `Optimizer` adds the metric `learning_rate`.
        average_decay: decay of the moving average; early on it is `(1 + step) / (10 + step)` if that is less.
        trained: `step -> [w]`, 1 where a parameter is trained at this step and 0 where it is frozen; its value is
            data, so that phases of a run share one compilation. None trains everything.
    """

    def step_function(state: TrainState, batch, key: Array):
        step_key = jax.random.fold_in(key, state.step)

        def objective(tree: PyTree):
            arguments = (tree, batch, step_key, state.step)
            if state.extra is None:
                value, metrics = cast(LossFunction, loss)(*arguments)
                return value, (metrics, None)
            value, metrics, extra = cast(StatefulLossFunction, loss)(*arguments, state.extra)
            return value, (metrics, extra)

        tree = split_columns(unravel(gather(state.params)))
        (value, (metrics, extra)), tree_gradient = jax.value_and_grad(objective, has_aux=True)(tree)
        gradient = scatter(_one_after_another(tree_gradient))
        mask = 1.0 if trained is None else trained(state.step)
        # Frozen parameters count neither in the clipped norm nor in the moments.
        gradient = gradient * mask
        norm = optax.global_norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(value)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = state.params + jnp.asarray(updates) * mask
        decay = jnp.minimum(average_decay, (1.0 + state.step) / (10.0 + state.step))
        average = decay * state.average + (1.0 - decay) * params

        def keep(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        new_state = TrainState(
            state.step + 1,
            keep(params, state.params),
            keep(average, state.average),
            keep(optimizer_state, state.optimizer),
            keep(extra, state.extra),
        )
        own = {"loss": value, "gradient_norm": norm, "skipped": 1.0 - finite.astype(jnp.float32)}
        if isinstance(optimizer, Optimizer):
            own["learning_rate"] = optimizer.learning_rate(state.optimizer)
        return new_state, own | metrics

    return step_function


def _one_after_another(tree: PyTree) -> Vector:
    """`ravel_pytree(tree)`, each array copied to its place on its own.

    XLA's CPU compiler fuses a concatenation into the arithmetic that follows and then asks for every single element
    which of hundreds of arrays it lies in: a fifth of a small training step.
    """
    leaves = jax.lax.optimization_barrier([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    vector = jnp.zeros(sum(leaf.size for leaf in leaves), jnp.float32)
    start = 0
    for leaf in leaves:
        vector = jax.lax.dynamic_update_slice(vector, leaf, (start,))
        start += leaf.size
    return jax.lax.optimization_barrier(vector)
