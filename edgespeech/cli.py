"""The command line: `edgespeech COMMAND ...`, or `python -m edgespeech COMMAND ...`."""

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence

from edgespeech import __version__
from edgespeech.commands import bench, demo, enhance, export, inspect, transcribe
from edgespeech.errors import InputError

COMMANDS = {
    "transcribe": transcribe,
    "enhance": enhance,
    "inspect": inspect,
    "export": export,
    "bench": bench,
    "demo": demo,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 1 where part of the work failed, 2 for bad input, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="edgespeech", description="Speech recognition on devices: use, inspect, export, time."
    )
    parser.add_argument("--version", action="version", version=f"edgespeech {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").split("\n")[0]
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        command.add_arguments(subparser)
    parsed = parser.parse_args(arguments)
    try:
        _keep_compiled_programs()
        with _few_collections():
            return COMMANDS[parsed.command].run(parsed)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _few_collections() -> Iterator[None]:
    """Searches for unreachable cycles seldom: imports and tracing make objects that stay.

    With Python's own threshold of 700 the searches took an eighth of the time to the first word.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(50_000, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def _keep_compiled_programs() -> None:
    """A second start compiles nothing; a folder that the user's environment names stays.

    Through the environment: JAX reads it when it is imported, and some commands never import it.
    """
    from edgespeech.data.corpus import cache_folder

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder(None, "xla")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
