"""The MSE diagnostic sweep: how hard it is to replace the attention of each layer.

For every layer on its own, a replacement is trained on the teacher's pairs (input of the attention, output after the
output projection) with masked MSE, all layers with the same data and number of steps. Ascending error is the order of
replacement. That a sweep ranks the layers and gives the order is the paper's (arXiv 2603.16922); the procedure is ours.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.conversion.capture import capture
from edgespeech.conversion.layers import mixer_layers
from edgespeech.conversion.mixers import MixerFactory
from edgespeech.conversion.task import Task
from edgespeech.data.batching import Batch
from edgespeech.nn.lpa import anneal
from edgespeech.ops.mask import mask_from_lengths
from edgespeech.training.state import LossFunction
from edgespeech.types import Array, Float, Scalar


class Pairs(NamedTuple):
    """The captured calls of all layers, stacked.

    Attributes:
        x: `[l b n d]`, inputs of the attention.
        y: `[l b n d]`, its outputs.
        lengths: `[b]`, valid frames; 0 for filler rows, whose frames count nowhere.
    """

    x: Float[Array, "l b n d"]
    y: Float[Array, "l b n d"]
    lengths: Float[Array, "b"]


class LayerError(NamedTuple):
    """Error of one layer's replacement on held-out audio.

    Attributes:
        mse: mean of `(replacement(x) - y)^2` over valid frames and channels.
        variance: of y over the same frames, the mean of each channel taken off.
    """

    mse: float
    variance: float

    @property
    def relative_mse(self) -> float:
        """`mse / variance`: 1 is what a constant output would reach."""
        return self.mse / self.variance


def capture_pairs(model: nnx.Module, task: Task, batch: Batch) -> Pairs:
    """Runs the teacher without dropout or augmentation and stacks what its mixers saw."""
    _, calls = capture(model, batch, call=task.forward)
    lengths = jnp.where(batch.weights > 0, calls[0].lengths, 0)
    return Pairs(jnp.stack([c.x for c in calls]), jnp.stack([c.y for c in calls]), lengths)


def make_replacements(model: nnx.Module, factory: MixerFactory, seed: int) -> list[nnx.Module]:
    """A new replacement for the attention of every layer; layer i draws from `fold_in(seed, i)`."""
    return [
        factory(layer.mixer, nnx.Rngs(jax.random.fold_in(jax.random.key(seed), index)))
        for index, layer in enumerate(mixer_layers(model).values())
    ]


def stack(modules: Sequence[nnx.Module]) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Modules of one structure as one graph with stacked arrays: graph, parameters, other state."""
    graphdef, params, rest = zip(*(nnx.split(m, nnx.Param, ...) for m in modules), strict=True)
    return (
        graphdef[0],
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *params),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *rest),
    )


def unstack(
    graphdef: nnx.GraphDef, params: nnx.State, rest: nnx.State, count: int
) -> list[nnx.Module]:
    """The modules that `stack` took, with these arrays."""
    return [
        nnx.merge(graphdef, *jax.tree.map(lambda leaf, i=i: leaf[i], (params, rest)))
        for i in range(count)
    ]


def sweep_progress(step: Array, num_steps: int) -> tuple[Scalar, Scalar]:
    """Temperature progress and hardness at a step: soft and annealing for 0.7 of the run, then hard (ours)."""
    progress = jnp.clip(step / max(1.0, 0.7 * num_steps), 0.0, 1.0).astype(jnp.float32)
    return progress, (step >= 0.7 * num_steps).astype(jnp.float32)


def squared_errors(graphdef: nnx.GraphDef, params, rest, pairs: Pairs) -> Float[Array, "l"]:
    """Sum over valid frames and channels of each layer's squared error."""
    mask = mask_from_lengths(pairs.lengths, pairs.x.shape[2])[..., None]

    def one(params, rest, x, y):
        prediction = nnx.merge(graphdef, params, rest)(x, pairs.lengths)
        return jnp.sum(jnp.where(mask, jnp.square(prediction - y), 0.0))

    return jax.vmap(one)(params, rest, pairs.x, pairs.y)


def sweep_objective(
    graphdef: nnx.GraphDef,
    rest: nnx.State,
    variances: Float[Array, "l"],
    num_steps: int,
    curriculum: bool = True,
) -> LossFunction:
    """Sum over layers of MSE / variance: no layer's gradient reaches another's parameters.

    The variance divides so that no layer rules the clipping of the gradient; the report has both errors. Temperatures
    follow `sweep_progress`; without the curriculum they are at their least, and gates hard, from the start.
    """

    def loss(params, pairs: Pairs, key, step):
        del key
        replacement = nnx.merge(graphdef, params, rest, copy=True)
        cold = jnp.ones(()), jnp.ones(())
        anneal(replacement, *(sweep_progress(step, num_steps) if curriculum else cold))
        _, params, state = nnx.split(replacement, nnx.Param, ...)
        count = jnp.maximum(jnp.sum(pairs.lengths), 1) * pairs.x.shape[-1]
        relative = squared_errors(graphdef, params, state, pairs) / count / variances
        return jnp.sum(relative), {"relative_mse": jnp.mean(relative)}

    return loss


@jax.jit
def _moments(pairs: Pairs):
    mask = mask_from_lengths(pairs.lengths, pairs.y.shape[2])[None, :, :, None]
    y = jnp.where(mask, pairs.y, 0.0)
    return jnp.sum(pairs.lengths), jnp.sum(y, (1, 2)), jnp.sum(jnp.square(y), (1, 2))


def output_variances(pairs: Iterable[Pairs]) -> np.ndarray:
    """Variance `[l]` of each layer's attention output over valid frames, float64: mean over channels."""
    count, total, square = 0.0, np.zeros(()), np.zeros(())
    for batch in pairs:
        n, s, q = (np.asarray(a, np.float64) for a in _moments(batch))
        count, total, square = count + n, total + s, square + q
    return (square / count - (total / count) ** 2).mean(-1)


def layer_errors(
    graphdef: nnx.GraphDef, params: nnx.State, rest: nnx.State, pairs: Sequence[Pairs]
) -> list[LayerError]:
    """MSE and variance of every layer over held-out pairs, with hard gates."""
    replacement = nnx.merge(graphdef, params, rest, copy=True)
    anneal(replacement, jnp.ones(()), jnp.ones(()))
    _, params, rest = nnx.split(replacement, nnx.Param, ...)
    run = jax.jit(lambda p, r, batch: squared_errors(graphdef, p, r, batch))
    total = np.sum([np.asarray(run(params, rest, batch), np.float64) for batch in pairs], axis=0)
    count = sum(float(batch.lengths.sum()) for batch in pairs) * pairs[0].x.shape[-1]
    variances = output_variances(pairs)
    return [LayerError(float(t) / count, float(v)) for t, v in zip(total, variances, strict=True)]
