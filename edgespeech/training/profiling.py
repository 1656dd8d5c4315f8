"""A profile of some training steps."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


class StepProfile:
    """Traces some of the steps that it sees, host and devices of this process, with JAX's profiler.

    The trace lies in `folder/plugins/profile/TIME/`: `*.xplane.pb` for TensorBoard's profile plugin or `xprof`, and
    `*.trace.json.gz` for ui.perfetto.dev. Steps have the name `train` in it.

    Args:
        folder: made when the trace begins.
        first: the first traced step, counted from 0 over the steps that this object sees.
        count: traced steps; 0: none.
    """

    def __init__(self, folder: Path, first: int, count: int):
        self._folder, self._first, self._count = folder, first, count
        self._seen = 0
        self._tracing = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[list[Any]]:
        """Around a step.

        Args:
            number: of the step, as the trace shows it.

        Yields:
            A list for the step's outputs: a trace ends when those of its last step are there.
        """
        if self._count and self._seen == self._first:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        self._seen += 1
        outputs: list[Any] = []
        if not self._tracing:
            yield outputs
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield outputs
        if self._seen == self._first + self._count:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Writes what is traced so far."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
