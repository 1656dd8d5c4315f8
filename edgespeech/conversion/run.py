"""The two stages of a conversion, each resumable: the sweep over all layers, and progressive replacement."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

from edgespeech.conversion.distil import (
    DistilConfig,
    Lesson,
    apply_windows,
    distil_objective,
    trainable,
    trained_mask,
    windows,
)
from edgespeech.conversion.fit import fit_linear_part
from edgespeech.conversion.layers import mixer_layers
from edgespeech.conversion.mixers import MixerFactory
from edgespeech.conversion.sweep import (
    LayerError,
    Pairs,
    capture_pairs,
    layer_errors,
    make_replacements,
    output_variances,
    stack,
    sweep_objective,
    unstack,
)
from edgespeech.conversion.switch import finalise, install_switches
from edgespeech.conversion.task import Task
from edgespeech.data.batching import Batch, BatchSource
from edgespeech.nn.lpa import LPA
from edgespeech.training.loop import LoopConfig, train
from edgespeech.training.state import (
    OptimizerConfig,
    init_state,
    make_optimizer,
    make_step,
    scheduled,
)

ReplacementOrder = Literal["mse", "relative_mse", "forward", "backward", "random"]


@dataclass(frozen=True)
class Job:
    """Where and on what the stages of one conversion run.

    Attributes:
        workdir: folder of the run.
        source: training batches.
        seed: of new parameters and of the steps.
        loop: see `LoopConfig`.
    """

    workdir: Path
    source: BatchSource
    seed: int
    loop: LoopConfig


class Teacher:
    """A trained model of a task and the two things that a conversion asks of it, compiled once for each batch shape."""

    def __init__(self, model: Any, task: Task):
        self.model, self.task = model, task
        self.graphdef, self.state = nnx.split(model)
        scanned = nnx.clone(model)
        scanned.scan_layers = True
        scanned_graphdef, _ = nnx.split(scanned)
        self._pairs = jax.jit(
            lambda state, batch: capture_pairs(nnx.merge(self.graphdef, state), task, batch)
        )
        self._predict = jax.jit(
            lambda state, batch: task.forward(nnx.merge(scanned_graphdef, state), batch)
        )

    def pairs(self, batch: Batch) -> Pairs:
        """What goes into and out of the attention of every layer."""
        return self._pairs(self.state, batch)

    def lesson(self, batch: Batch, frozen: nnx.State) -> Lesson:
        """The batch with the teacher's prediction."""
        return Lesson(batch, self._predict(self.state, batch), frozen)


def run_sweep(
    name: str,
    teacher: Teacher,
    factory: MixerFactory,
    num_steps: int,
    heldout: Sequence[Pairs],
    job: Job,
    learning_rate: float = 3e-3,
    curriculum: bool = True,
    fit: bool = False,
) -> tuple[list[nnx.Module], list[LayerError]]:
    """Trains one replacement for every layer side by side; returns them with their held-out errors.

    Args:
        name: of the kind of replacement; the stage is `sweep_NAME`.
        teacher: the model whose attention is replaced.
        factory: makes a replacement.
        num_steps: updates that each layer gets; a replacement without parameters gets none.
        heldout: pairs of audio that is not trained on.
        job: see `Job`.
        learning_rate: peak of AdamW.
        curriculum: see `DistilConfig`.
        fit: start LPAs from `fit_linear_part` on the first batch.
    """
    replacements = make_replacements(teacher.model, factory, job.seed)
    if fit:
        pairs = teacher.pairs(job.source.batch(0))
        for lpa, x, y in zip(replacements, pairs.x, pairs.y, strict=True):
            if isinstance(lpa, LPA):
                fit_linear_part(lpa, x, y, pairs.lengths)
    graphdef, params, rest = stack(replacements)
    if jax.tree.leaves(params):
        variances = jnp.asarray(output_variances(heldout), jnp.float32)
        vector, unravel = ravel_pytree(params)
        # Layers are independent of each other: one norm over all of them must not couple them.
        # No decay: stacked over layers, biases would count as matrices.
        config = OptimizerConfig(
            learning_rate=learning_rate, clip=1e9, weight_decay=0.0, average_decay=0.0
        )
        optimizer = make_optimizer(config, num_steps, params)
        objective = sweep_objective(graphdef, rest, variances, num_steps, curriculum)
        settings = {
            "steps": num_steps,
            "parameters": vector.size,
            "curriculum": curriculum,
            "fit": fit,
        }
        state = train(
            f"sweep_{name}",
            make_step(objective, unravel, optimizer, 0.0),
            init_state(params, optimizer),
            job.source,
            num_steps,
            workdir=job.workdir,
            settings=settings,
            seed=job.seed,
            config=job.loop,
            prepare=teacher.pairs,
        )
        params = unravel(state.params)
    errors = layer_errors(graphdef, params, rest, heldout)
    return unstack(graphdef, params, rest, len(replacements)), errors


class Progressive:
    """Replaces layers one at a time; every number of replaced layers runs through the same compiled programs.

    Args:
        name: of the kind of replacement; the stage is `convert_NAME`.
        teacher: what the student starts from and learns from.
        replacements: one for every layer, from the sweep.
        order: layers to replace, from 0, first to last.
        config: see `DistilConfig`.
        job: see `Job`.
    """

    def __init__(
        self,
        name: str,
        teacher: Teacher,
        replacements: list[nnx.Module],
        order: tuple[int, ...],
        config: DistilConfig,
        job: Job,
    ):
        self._name, self._teacher, self._order, self._config, self._job = (
            name,
            teacher,
            order,
            config,
            job,
        )
        student = nnx.clone(teacher.model)
        install_switches(student, replacements)
        student.scan_layers = True
        self._graphdef, params, self._frozen = nnx.split(student, trainable(student), ...)
        _, self._unravel = ravel_pytree(params)
        optimizer = scheduled(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b1=0.9, b2=0.98),
            schedule=lambda step: config.schedule(jnp.asarray(step), len(order)),
        )
        self._mask = trained_mask(params, student, order, config)
        self._step = make_step(
            distil_objective(self._graphdef, teacher.task, order, config),
            self._unravel,
            optimizer,
            0.0,
            self._mask,
        )
        self._state = init_state(params, optimizer)
        self._count = 0
        self.graphdef = nnx.split(self._student())[0]

    def advance(self, count: int) -> None:
        """Trains until so many layers are replaced; what an earlier run has trained is taken up.

        The joint steps, if there are any, belong to the last layer of the order.
        """
        self._state = train(
            f"convert_{self._name}",
            self._step,
            self._state,
            self._job.source,
            self._config.num_steps(count, len(self._order)),
            workdir=self._job.workdir,
            settings={"order": [i + 1 for i in self._order], **self._config.settings},
            seed=self._job.seed,
            config=self._job.loop,
            prepare=lambda batch: self._teacher.lesson(batch, self._frozen),
        )
        self._count = count

    def trained_parameters(self) -> int:
        """How many parameters learn in the last step so far."""
        last = self._config.num_steps(self._count, len(self._order)) - 1
        return int(np.sum(np.asarray(self._mask(jnp.asarray(last))), dtype=np.int64))

    def _student(self) -> Any:
        """The model with switches, hard, as it stands."""
        student = nnx.merge(
            self._graphdef, self._unravel(self._state.params), self._frozen, copy=True
        )
        last = jnp.asarray(self._count * self._config.steps_per_layer - 1)
        num_layers = len(mixer_layers(student))
        state = windows(self._order, num_layers, last, self._config)
        # A window of one or two steps ends before its hard phase begins.
        apply_windows(student, state._replace(hard=state.active))
        return student

    def state(self) -> nnx.State:
        """State for `graphdef`: the hybrid as it stands, through the same program for every number of layers."""
        return nnx.split(self._student())[1]

    def hybrid(self) -> Any:
        """The hybrid as it stands, each slot holding one mixer."""
        student = self._student()
        student.scan_layers = False
        finalise(student, self._order[: self._count])
        return student


def replacement_order(
    errors: Sequence[LayerError], rule: ReplacementOrder = "mse", seed: int = 0
) -> tuple[int, ...]:
    """All layers, counted from 0, in the order in which they are replaced.

    Args:
        errors: of the sweep, one a layer.
        rule: `mse`, ascending error (the paper's diagnostic, as we read it); `relative_mse`, ascending share of the
            variance that is missed; `forward`, from the first layer on; `backward`; `random`.
        seed: of `random`.
    """
    layers = np.arange(len(errors))
    if rule == "random":
        layers = np.random.default_rng(seed).permutation(layers)
    elif rule == "backward":
        layers = layers[::-1]
    elif rule != "forward":
        layers = np.argsort([getattr(error, rule) for error in errors], kind="stable")
    return tuple(int(layer) for layer in layers)
