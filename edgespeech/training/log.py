"""What a stage writes while it trains: metrics, timing, progress, and the steps that were skipped."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from edgespeech.data.batching import BatchSource
from edgespeech.training.metrics import MetricsWriter, Progress
from edgespeech.training.skipped import SkippedSteps
from edgespeech.training.timing import Clock
from edgespeech.training.wandb_log import wandb_log


class StageLog:
    """Gathers what the steps return, and writes it: means to the metrics, the rest where it belongs."""

    def __init__(
        self,
        metrics: MetricsWriter,
        timing: MetricsWriter,
        progress: Progress,
        skipped: SkippedSteps,
        clock: Clock,
    ):
        self._metrics, self._timing, self._progress = metrics, timing, progress
        self._skipped, self._clock = skipped, clock
        self._pending: list[tuple[int, dict, dict]] = []

    def add(self, step: int, metrics: dict, counts: dict) -> None:
        """Takes what a step returns, which need not be there yet."""
        self._pending.append((step, metrics, counts))

    def write(self) -> None:
        """Waits for the steps since the last call and writes them, if there are any."""
        if not self._pending:
            return
        steps, metrics, counts = zip(*jax.device_get(self._pending), strict=True)
        self._pending.clear()
        means = {name: float(np.mean([row[name] for row in metrics])) for name in metrics[0]}
        sums = {name: float(np.sum([row[name] for row in counts])) for name in counts[0]}
        self._metrics.write(steps[-1], means)
        self._timing.write(steps[-1], self._clock.report(len(steps), 1.0 - means["skipped"], sums))
        self._progress.update(steps[-1] + 1, means)
        for step, row in zip(steps, metrics, strict=True):
            if row["skipped"]:
                self._skipped.add(step)


class NoLog:
    """What the processes other than the first write: nothing."""

    def add(self, *_) -> None:
        """Takes nothing."""

    def write(self) -> None:
        """Writes nothing."""


@contextlib.contextmanager
def stage_log(
    workdir: Path,
    stage: str,
    source: BatchSource,
    first: int,
    num_steps: int,
    quiet: bool,
    clock: Clock,
    wandb_project: str | None = None,
) -> Iterator[StageLog | NoLog]:
    """The log of a stage in the folder of its run: on process 0, what it writes; on the others nothing.

    Args:
        workdir: folder of the run.
        stage: name of the stage.
        source: batches by step, with the rows of all processes.
        first: the first step of this run; see `MetricsWriter`.
        num_steps: of the stage.
        quiet: no progress on the terminal.
        clock: of the stage.
        wandb_project: see `wandb_log`.
    """
    if jax.process_index() > 0:
        yield NoLog()
        return
    with (
        wandb_log(wandb_project, workdir, stage, first) as also,
        MetricsWriter(workdir, stage, resume_step=first, log=also) as metrics,
        MetricsWriter(workdir, stage, resume_step=first, kind="timing", log=also) as timing,
        Progress(stage, num_steps, initial=first, quiet=quiet) as progress,
    ):
        skipped = SkippedSteps(workdir, stage, source, first, quiet)
        clock.begin()
        yield StageLog(metrics, timing, progress, skipped, clock)
