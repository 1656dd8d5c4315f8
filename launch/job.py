"""What the launchers share: the command after `--`, and how one waits for a job of its own."""

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from edgespeech.errors import InputError


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own options, and the command after the first `--`, empty where there is none."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    return parser.parse_args(given[:cut]), given[cut + 1 :]


def require_command(command: Sequence[str], *, resumed_by: str | None = None) -> None:
    """Checks the command of a job.

    Args:
        command: what is to run.
        resumed_by: who starts the job anew after an interruption, if anyone does.

    Raises:
        InputError: there is no command; or it would be started anew and does not say `--resume`.
    """
    if not command:
        raise InputError("no command: end with `-- python -m experiments.PROGRAM --FLAGS`")
    if resumed_by and "--resume" not in command:
        raise InputError(
            f"the command lacks --resume, and {resumed_by} starts it anew after an interruption: a program refuses a "
            f"workdir that holds a run already; add --resume to `{shlex.join(command)}`"
        )


def call(
    command: Sequence[str], *, stdin: str | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs a tool of the cluster's and returns what it printed.

    Raises:
        InputError: it is not installed, or (with `check`) it failed; the message holds what it said.
    """
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError(
            f"{command[0]} is not on the PATH: install it (launch/README.md says how), or add --dry_run"
        ) from None
    if check and done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise InputError(f"`{shlex.join(command)}` ended with {done.returncode}: {said}")
    return done


def wait(poll: Callable[[], int | None], stop: Callable[[], object], interval: float) -> int:
    """Waits until a job has ended; Ctrl-C or SIGTERM, see `main`, ends it first.

    Args:
        poll: the exit status of the job, None while it is there.
        stop: ends the job.
        interval: seconds between two looks.
    """
    try:
        while (status := poll()) is None:
            time.sleep(interval)
        return status
    except KeyboardInterrupt:
        stop()
        raise


def main(run: Callable[[], int]) -> None:
    """Exits with the status of `run`; 2 after bad input, with its message alone; 130 after Ctrl-C or SIGTERM."""

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        status = run()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.exit(status)
