"""The training loop: the one that teacher, sweep and conversion share."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from edgespeech.data.batching import Batch, BatchSource
from edgespeech.training.checkpoint import StageCheckpoints
from edgespeech.training.metrics import MetricsWriter, Progress
from edgespeech.training.sharding import data_mesh, replicate, shard_rows
from edgespeech.training.state import StepFunction, TrainState


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How a stage runs.

    Attributes:
        save_every: steps between checkpoints.
        log_every: steps between written metrics.
        threads: threads that decode audio.
        quiet: no progress on the terminal.
    """

    save_every: int = 200
    log_every: int = 10
    threads: int = 1
    quiet: bool = False


def train(
    stage: str,
    step_function: StepFunction,
    state: TrainState,
    source: BatchSource,
    num_steps: int,
    *,
    workdir: Path,
    settings: dict,
    seed: int,
    config: LoopConfig,
    prepare: Callable[[Batch], object] | None = None,
) -> TrainState:
    """Runs a stage up to `num_steps` updates, from its newest checkpoint if it has one.

    A run that is interrupted, by an exception or Ctrl-C, has its last full step saved; one that is killed goes on from
    the checkpoint before. Both continue bit for bit: batch and random numbers are functions of the step.

    Args:
        stage: names checkpoints, metrics and progress.
        step_function: see `make_step`; jitted here, and its state donated.
        state: the state before the first step; not used up.
        source: batches by step.
        num_steps: updates in all, those before a resume included.
        workdir: where the run keeps everything.
        settings: what a checkpoint of this stage must have been made with.
        seed: of the random numbers of all steps.
        config: see `LoopConfig`.
        prepare: turns a batch, on the devices, into what the step function gets.

    Returns:
        The state after the last step.
    """
    mesh = data_mesh()
    key = replicate(jax.random.key(seed), mesh)
    step_jit = jax.jit(step_function, donate_argnums=0)
    with StageCheckpoints(workdir, stage, settings) as checkpoints:
        state = replicate(state, mesh)
        state = checkpoints.restore(state) or state
        first = int(state.step)
        if first >= num_steps:
            return state
        # Donation would take the caller's arrays with it.
        state = jax.tree.map(lambda leaf: leaf.copy(), state)
        steps = source.iterator(first, num_steps - first, threads=config.threads)
        pending: list = []
        with (
            MetricsWriter(workdir, stage, resume_step=first) as writer,
            Progress(stage, num_steps, initial=first, quiet=config.quiet) as progress,
        ):
            try:
                for step, batch in steps:
                    on_device = shard_rows(batch, mesh)
                    if prepare is not None:
                        on_device = prepare(on_device)
                    state, metrics = step_jit(state, on_device, key)
                    pending.append(metrics)
                    if (step + 1) % config.log_every == 0 or step + 1 == num_steps:
                        means = _mean(pending)
                        pending.clear()
                        writer.write(step, means)
                        progress.update(step + 1, means)
                    if (step + 1) % config.save_every == 0:
                        checkpoints.save(state)
            finally:
                steps.close()
                # An interrupt inside a step may find its input given away and its output not there yet.
                if not state.step.is_deleted():
                    checkpoints.save(state)
    return state


def _mean(rows: list[dict]) -> dict[str, float]:
    rows = jax.device_get(rows)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
