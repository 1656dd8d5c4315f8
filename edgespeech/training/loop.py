"""The training loop: the one that teacher, sweep and conversion share."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from edgespeech.data.batching import Batch, BatchSource
from edgespeech.errors import InputError
from edgespeech.nn.remat import rematerialised
from edgespeech.training import stopping
from edgespeech.training.checkpoint import StageCheckpoints
from edgespeech.training.distributed import barrier, require_same
from edgespeech.training.log import stage_log
from edgespeech.training.profiling import StepProfile
from edgespeech.training.sharding import Layout, make_mesh, row_shards, shard_rows
from edgespeech.training.state import StepFunction, TrainState
from edgespeech.training.timing import Clock, count
from edgespeech.training.watchdog import watchdog

_meetings = itertools.count()  # names of places where all processes meet are used once


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How a stage runs.

    Attributes:
        save_every: steps between checkpoints.
        log_every: steps between written metrics.
        threads: threads that decode audio and make batches ahead.
        quiet: no progress on the terminal.
        fsdp: parts that the training state is cut into; see `make_mesh`.
        model_parallel: parts that the columns of the weights are cut into.
        watchdog_minutes: without a step after which the stacks of all threads are printed; 0: never.
        remat: compute the inside of every layer again in the backward pass; see `rematerialised`.
        profile_steps: steps of the stage that process 0 traces into `workdir/profile/STAGE`; 0: none.
        profile_from: the first of them, counted from the first step of this start.
        wandb_project: of Weights & Biases, which gets what TensorBoard gets; None: does not.
    """

    save_every: int = 200
    log_every: int = 10
    threads: int = 1
    quiet: bool = False
    fsdp: int = 1
    model_parallel: int = 1
    watchdog_minutes: float = 0.0
    remat: bool = False
    profile_steps: int = 0
    profile_from: int = 5
    wandb_project: str | None = None


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

    Where there are several processes, all call this alike, with the whole `source`: each reads its rows of every batch.
    They write one series of checkpoints; process 0 writes the metrics. An error of one of them saves nothing, since
    saving takes all.

    Args:
        stage: names checkpoints, metrics and progress.
        step_function: see `make_step`; compiled here, and its state donated.
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

    Raises:
        InputError: the devices cannot be divided as asked; the batches not over the devices; a checkpoint was made with
            other settings; or the processes differ.
        Stopped: the run was told to stop, and is saved.
    """
    stopper, clock = stopping.current(), Clock()
    mesh = make_mesh(config.fsdp, config.model_parallel)
    shards, processes = row_shards(mesh), jax.process_count()
    for shape in source.shapes:
        if shape.b % shards:
            raise InputError(
                f"batches of {shape.b} rows cannot be cut for {shards} devices: set batch_multiple to "
                f"a multiple of {shards}"
            )
    rows = source.host_slice(jax.process_index(), processes)
    with StageCheckpoints(workdir, stage, settings) as checkpoints:
        restored = checkpoints.restore(state)
        first = 0 if restored is None else int(restored.step)
        about = {"steps": num_steps, "first": first, "settings": settings}
        require_same(f"{stage} ({next(_meetings)})", json.dumps(about, sort_keys=True))
        if restored is not None:
            state = restored
        if first >= num_steps:
            return jax.tree.map(jnp.asarray, state)
        size = state.params.size
        layout = Layout(mesh, state, size)
        state, key = layout.place(state), layout.key(seed)
        compile_for = layout.compiler(step_function)
        programs: dict[tuple[int, ...], Callable] = {}
        steps = rows.iterator(first, num_steps - first, threads=config.threads)
        traced = config.profile_steps if jax.process_index() == 0 else 0
        profile = StepProfile(workdir / "profile" / stage, config.profile_from, traced)
        together = True  # with the other processes, as far as this one knows
        with (
            stage_log(
                workdir, stage, source, first, num_steps, config.quiet, clock, config.wandb_project
            ) as log,
            watchdog(config.watchdog_minutes) as alive,
            contextlib.closing(profile),
        ):
            try:
                while True:
                    with clock.spent_on("data"):
                        step, batch = next(steps, (num_steps, None))
                    if batch is None or stopper.stop_here():
                        log.write()
                        break
                    shape, new = batch.audio.shape, batch.audio.shape not in programs
                    with (
                        profile.step(step) as outputs,
                        clock.spent_on("compile") if new else contextlib.nullcontext(),
                    ):
                        on_devices = shard_rows(batch, mesh)
                        prepared = on_devices if prepare is None else prepare(on_devices)
                        if new:
                            with rematerialised(config.remat):
                                programs[shape] = compile_for(state, prepared, key)
                            # Collectives wait less long for each other than compilers may differ.
                            barrier(f"compiled/{next(_meetings)}")
                        state, metrics = programs[shape](state, prepared, key)
                        outputs.append(metrics)
                        if new:
                            jax.block_until_ready(metrics)
                    stopper.unsaved()
                    alive()
                    log.add(step, metrics, count(on_devices))
                    if (step + 1) % config.log_every == 0 or step + 1 == num_steps:
                        log.write()
                    if (step + 1) % config.save_every == 0:
                        with clock.spent_on("checkpoint"):
                            checkpoints.save(state, size)
            except BaseException:
                together = processes == 1
                raise
            finally:
                steps.close()
                # An interrupt inside a step may find its input given away and its output not there yet.
                if together and not state.step.is_deleted():
                    checkpoints.save(state, size)
        checkpoints.finish()
        if checkpoints.failure and int(state.step) < num_steps:
            raise InputError(f"the run was told to stop, but {checkpoints.failure}")
        state = layout.whole(state)
    stopper.saved()
    return state
