"""Numbers of a training stage: JSON lines, TensorBoard events, and progress on the terminal.

A value may be anything that `float` takes. On several hosts, write from one.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from tensorboardX import SummaryWriter
from tqdm import tqdm

from edgespeech.errors import InputError
from edgespeech.training.wandb_log import Log


class MetricsWriter:
    """Context manager that writes one row per step of one stage.

    Rows go to `workdir/KIND/STAGE.jsonl` (flushed, so that a killed run loses none) and to
    TensorBoard events under `workdir/tensorboard/KIND/STAGE`, for the kind metrics
    `workdir/tensorboard/STAGE`. `resume_step` is the first step that this run computes: rows of
    that step and later, left by a run that was killed after its checkpoint, are dropped, and so is
    a half-written last line. The default 0 starts the stage anew. A value that is not finite is
    null in the JSON lines, which have no NaN.

    Args:
        workdir: folder of the run.
        stage: name of the stage.
        resume_step: see above.
        kind: metrics, which a run repeats exactly, or timing, which depends on the machine.
        log: gets every row as well, with names `timing/NAME` for the kind timing; None: nothing more.

    Raises:
        InputError: the stage is not a plain file name, `resume_step` is negative, or the file of an
            earlier run is corrupt.
    """

    def __init__(
        self,
        workdir: str | Path,
        stage: str,
        *,
        resume_step: int = 0,
        kind: Literal["metrics", "timing"] = "metrics",
        log: Log | None = None,
    ):
        if not re.fullmatch(r"[\w.-]*\w", stage):
            raise InputError(
                f"stage {stage!r} names a file: use letters, digits, '_', '-' and '.', the last "
                "character a letter or digit"
            )
        if resume_step < 0:
            raise InputError(f"resume_step {resume_step} is below 0: give the first step to write")
        self._log, self._prefix = log, "" if kind == "metrics" else f"{kind}/"
        self.path = Path(workdir) / kind / f"{stage}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _keep_rows_before(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        # TensorBoard hides the events of an earlier run from purge_step on. The names of event
        # files count in seconds: the suffix keeps a quick resume from writing over the first run.
        self._events = SummaryWriter(
            str(Path(workdir) / "tensorboard" / ("" if kind == "metrics" else kind) / stage),
            purge_step=resume_step,
            filename_suffix=f".{resume_step}",
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of one step.

        Raises:
            InputError: a metric is called "step".
        """
        if "step" in metrics:
            raise InputError('a metric is called "step", the name of the counter: rename it')
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(_to_line({"step": int(step), **values}))
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, int(step))
        if self._log is not None:
            self._log(int(step), {self._prefix + name: value for name, value in values.items()})

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read the rows of a metrics file in order: `step` as int, the others as float, null as NaN.

    A last line that a killed run left half written is skipped.

    Raises:
        InputError: the file is missing, or another line is not a row.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"no metrics at {path}: run the stage that writes them first") from None
    *lines, _torn = text.split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
        except (ValueError, TypeError, AttributeError, KeyError):
            raise InputError(
                f"{path}, line {number} is not a row of metrics: {line[:80]!r}; remove that line"
            ) from None
        values = {name: math.nan if value is None else value for name, value in row.items()}
        rows.append({"step": step, **values})
    return rows


def _to_line(row: Mapping[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _keep_rows_before(path: Path, step: int) -> None:
    # Replaced in one move: a run killed here loses no row.
    kept = path.with_suffix(".tmp")
    rows = (row for row in read_metrics(path) if row["step"] < step)
    kept.write_text("".join(map(_to_line, rows)), encoding="utf-8")
    os.replace(kept, path)


class Progress:
    """Progress of one stage with the time left and the current metrics.

    A bar on a terminal; elsewhere (a log file) one line every `interval` seconds and one at the
    end. `quiet` prints nothing. `initial` is the number of steps done before this run.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        initial: int = 0,
        quiet: bool = False,
        stream: TextIO | None = None,
        interval: float = 10.0,
    ):
        self._stage, self._total, self._interval = stage, total, interval
        self._stream = sys.stderr if stream is None else stream
        self._done = self._printed_done = initial
        self._start = self._printed = time.monotonic()
        self._metrics: dict[str, float] = {}
        self._lines = not quiet and not self._stream.isatty()
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=stage,
            file=self._stream,
            disable=quiet or self._lines,
            dynamic_ncols=True,
        )

    def update(self, done: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Show that `done` steps of the stage are done, earlier runs included."""
        self._done = done
        if metrics is not None:
            self._metrics = {name: float(value) for name, value in metrics.items()}
        if self._lines:
            if time.monotonic() - self._printed >= self._interval:
                self._print()
            return
        self._bar.set_postfix_str(self._postfix(), refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Show the last state and leave it on the terminal."""
        if self._lines and self._done > self._printed_done:
            self._print()
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _postfix(self) -> str:
        return " ".join(f"{name}={value:.4g}" for name, value in self._metrics.items())

    def _print(self) -> None:
        now = time.monotonic()
        # The rate since the last line: that of the whole run would count the compilation.
        rate = (self._done - self._printed_done) / max(now - self._printed, 1e-9)
        line = tqdm.format_meter(
            self._done,
            self._total,
            now - self._start,
            ncols=0,
            prefix=self._stage,
            unit="step",
            rate=rate or None,
            postfix=self._postfix(),
        )
        print(line, file=self._stream, flush=True)
        self._printed, self._printed_done = now, self._done
