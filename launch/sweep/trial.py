"""One run of a sweep: its folder, its command on every engine, its process, and how it ended."""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgespeech.data.corpus import write_atomically
from edgespeech.errors import InputError
from launch.sweep.space import Settings

ENGINES = ("local", "slurm", "gke", "tpu")
_TAIL = 20  # lines of a failed trial's log


@dataclass
class Trial:
    """A run of the program, in WORKDIR/trials/NAME.

    Attributes:
        name: of its folder.
        settings: swept flags.
        state: `waiting`, `running`, `finished`, `failed` or `interrupted`.
        status: exit status.
        seconds: of its last turn.
        value: of the metric.
        note: what went wrong: the end of the log, or why there is no value.
    """

    name: str
    settings: Settings
    state: str = "waiting"
    status: int | None = None
    seconds: float = 0.0
    value: float | None = None
    note: str = ""


def engine_command(
    engine: str, options: Sequence[str], folder: Path, program: Sequence[str]
) -> list[str]:
    """The command that runs a program on an engine and ends when it ends, with its exit status.

    Args:
        engine: one of `ENGINES`.
        options: of the engine's launcher; for `local`, none runs the program itself and some go to `launch.local`.
        folder: of the trial; its hash names the job.
        program: module and flags.
    """
    python = sys.executable if engine in ("local", "slurm") else "python"
    command = [python, "-m", *program]
    if engine == "local" and not options:
        return command
    name = f"sweep-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:10]}"
    launcher = {
        "local": ["launch.local"],
        # A job that outlived a killed sweep keeps its successor waiting.
        "slurm": [
            *("launch.slurm", "--wait", f"--name={name}", f"--log_dir={folder}"),
            "--directive=--dependency=singleton",
        ],
        "gke": ["launch.gke", "--wait", f"--name={name}"],
        "tpu": ["launch.tpu", "run", "--wait", f"--fetch={folder}"],
    }[engine]
    return [sys.executable, "-m", *launcher, *options, "--", *command]


def read_metric(report: Path, key: str) -> float:
    """A number in report.json by its dotted key; a part of it that names a place in a list may be negative.

    Raises:
        InputError: there is no such report, key or number.
    """
    try:
        value = json.loads(report.read_text())
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"it is {json.dumps(value)[:40]}")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{report.name} has no number {key!r} ({error})") from error
    return float(value)


class Process:
    """A trial under way, in a process group of its own.

    Args:
        trial: becomes `running`.
        folder: of the trial; `trial.log` in it is appended to.
        command: see `engine_command`.

    Raises:
        InputError: a run that outlived an earlier sweep is still at it.
    """

    def __init__(self, trial: Trial, folder: Path, command: Sequence[str]):
        self.trial, self.folder = trial, folder
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "trial.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{folder}: a run of an earlier sweep is still at it; wait for its end, or end it"
                ) from None
            with (folder / "trial.log").open("ab") as log:
                self._log_start = log.tell()
                log.write(f"$ {shlex.join(command)}\n".encode())
                log.flush()
                # The lock goes with the process: it is held as long as anything of it lives.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[lock.fileno()],
                    start_new_session=True,
                )
        self._start = time.monotonic()
        trial.state, trial.status, trial.note = "running", None, ""

    def has_ended(self, metric: str) -> bool:
        """Whether the process is gone; the trial then knows its state and value, and keeps them in `trial.json`."""
        status = self._process.poll()
        if status is None:
            return False
        trial = self.trial
        trial.status, trial.seconds = status, round(time.monotonic() - self._start, 1)
        if status == 0 and (self.folder / "report.json").exists():
            trial.state = "finished"
            score(trial, self.folder, metric)
        else:
            trial.state = "failed"
            trial.note = self._tail() if status else f"no report.json\n{self._tail()}"
        content = json.dumps(asdict(trial), indent=2).encode()
        write_atomically(self.folder / "trial.json", lambda file: file.write(content))
        return True

    def ask_to_end(self) -> None:
        """Tells all of it to save and end."""
        self._signal(signal.SIGTERM)

    def end(self, deadline: float) -> None:
        """Waits until it has ended, and kills what is left of it at the deadline, in seconds of `time.monotonic`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        self._signal(signal.SIGKILL)
        self._process.wait()
        self.trial.state = "interrupted"

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _tail(self) -> str:
        with (self.folder / "trial.log").open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_TAIL:])


def score(trial: Trial, folder: Path, metric: str) -> None:
    """Reads the value of a finished trial, or notes why there is none."""
    trial.value, trial.note = None, ""
    try:
        trial.value = read_metric(folder / "report.json", metric)
    except InputError as error:
        trial.note = str(error)


def load_trial(folder: Path) -> Trial | None:
    """What an earlier sweep left of a finished or failed trial, if anything."""
    try:
        return Trial(**json.loads((folder / "trial.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
