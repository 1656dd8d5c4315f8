"""What every kind of timing shares: lengths, threads, repeats, and where the results go."""

import datetime
import importlib.metadata
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from edgespeech.errors import InputError
from edgespeech.evaluation.latency_peers import PACKAGES
from edgespeech.evaluation.machine import device, versions
from experiments import program

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)

flags.DEFINE_list("seconds", ["10", "30", "60", "120"], "Lengths of the audio.")
flags.DEFINE_integer(
    "threads", None, "Cores for all implementations (default: all that the process may use)."
)
flags.DEFINE_integer("repeats", 5, "Timed rounds over all contenders, after one of warm-up.")
flags.DEFINE_string("json", None, "File for the results.")


def facts(threads: int) -> dict[str, Any]:
    """What every result says of its run."""
    return {
        "versions": versions() | {name: package_version(name) for name in PACKAGES},
        "device": device(),
        "threads": threads,
        "date": datetime.date.today().isoformat(),
        "command": program.command_line(),
    }


def write_json(result: dict) -> None:
    """Writes the results to --json, if it is given."""
    if FLAGS.json:
        program.write_json(FLAGS.json, result)


def say(text: str) -> None:
    """Prints unless --quiet."""
    if not FLAGS.quiet:
        print(text, flush=True)


def read_seconds(num_frames: Callable[[int], int], sample_rate: int) -> list[float]:
    """--seconds, ascending, for a model that makes so many frames of audio at a rate.

    Raises:
        InputError: none, not a number, or too short for one frame.
    """
    shortest = 1
    while num_frames(shortest) < 1:
        shortest += 1
    seconds = set()
    for text in FLAGS.seconds:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"--seconds holds {text!r}: give numbers parted by commas")
        if value * sample_rate < shortest:
            raise InputError(
                f"--seconds holds {text}: one frame of {FLAGS.model} takes {shortest / sample_rate:g} s or more"
            )
        seconds.add(value)
    if not seconds:
        raise InputError("--seconds is empty: give at least one length")
    return sorted(seconds)


def check_writable(path: Path) -> None:
    """Finds out before the measurement whether the results can be stored.

    Raises:
        InputError: they cannot.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(
            f"--json={path} cannot be written ({error.strerror}): name another file"
        ) from error


def package_version(name: str) -> str:
    """Version of a peer's package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
