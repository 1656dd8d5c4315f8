"""How every program here starts and ends."""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from edgespeech.data.corpus import cache_folder, write_atomically
from edgespeech.errors import InputError
from edgespeech.training.stopping import Stopped
from edgespeech.training.watch import Watch

FLAGS = flags.FLAGS

flags.DEFINE_bool("quiet", False, "No progress on the terminal.")
flags.DEFINE_string(
    "cache_dir",
    None,
    "Folder of what can be made again: synthetic speech, tables of lengths, compiled programs "
    "(default: the user's cache folder).",
)
flags.DEFINE_enum(
    "matmul_precision",
    None,
    ["bfloat16", "tensorfloat32", "float32"],
    "Of products of float32 arrays: bfloat16 rounds their factors and adds up in float32, where the device can "
    "(default: the device's own).",
)


def main(experiment: Callable[[], None]) -> None:
    """Runs an experiment: bad input ends with its message alone and status 2, Ctrl-C with 130, SIGTERM with 0."""

    def run(arguments: list[str]) -> None:
        # Checkpoints are logged line by line at INFO; a bar says as much.
        logging.set_verbosity(logging.WARNING)
        watch = None
        with contextlib.ExitStack() as stack:
            try:
                if len(arguments) > 1:
                    raise InputError(
                        f"unexpected argument {arguments[1]!r}: every option starts with --, see --help"
                    )
                jax.config.update(
                    "jax_compilation_cache_dir", str(cache_folder(FLAGS.cache_dir, "xla"))
                )
                if FLAGS.matmul_precision:
                    jax.config.update("jax_default_matmul_precision", FLAGS.matmul_precision)
                if "coordinator" in FLAGS:
                    # Only programs that train have these flags.
                    from experiments import distributed_flags

                    watch = stack.enter_context(distributed_flags.joined())
                experiment()
            except (InputError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)
                leave(watch, 2, str(error))
            except Stopped:
                print("stopped: add --resume to go on", file=sys.stderr)
                leave(watch, 0)
            except KeyboardInterrupt:
                print("\ninterrupted: add --resume to go on from the last step", file=sys.stderr)
                leave(watch, 130, "interrupted")
            except Exception as error:
                if watch is None or not watch.together:
                    raise
                traceback.print_exc()
                watch.explain(error)
                leave(watch, 1, repr(error))

    def parse(arguments: list[str]) -> list[str]:
        try:
            return FLAGS(arguments)
        except flags.Error as error:
            print(f"error: {error}; --help lists the flags", file=sys.stderr)
            sys.exit(2)

    try:
        try:
            app.run(run, flags_parser=parse)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The output's reader is gone, as in `--help | head`. The interpreter flushes once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(watch: Watch | None, status: int, message: str = "") -> None:
    """Ends the program, and tells the other processes."""
    if watch is not None and watch.together:
        watch.leave(status, message)
    sys.exit(status)


def write_json(path: str, result: dict[str, Any]) -> None:
    """Writes results, plain JSON, whole or not at all."""
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    write_atomically(Path(path), lambda file: file.write(text.encode()))


def command_line() -> str:
    """The command as it was typed, to go into the report."""
    module = sys.modules["__main__"].__spec__
    name = module.name if module else os.path.basename(sys.argv[0])
    return " ".join(["python", "-m", name, *sys.argv[1:]])
