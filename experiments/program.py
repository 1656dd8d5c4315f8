"""How every program here starts and ends."""

import os
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging

from edgespeech.data.corpus import cache_folder
from edgespeech.errors import InputError

FLAGS = flags.FLAGS

flags.DEFINE_bool("quiet", False, "No progress on the terminal.")
flags.DEFINE_string(
    "cache_dir",
    None,
    "Folder of what can be made again: synthetic speech, tables of lengths, compiled programs "
    "(default: the user's cache folder).",
)


def main(experiment: Callable[[], None]) -> None:
    """Runs an experiment: bad input ends with its message alone and status 2, Ctrl-C with 130."""

    def run(arguments: list[str]) -> None:
        # Checkpoints are logged line by line at INFO; a bar says as much.
        logging.set_verbosity(logging.WARNING)
        try:
            if len(arguments) > 1:
                raise InputError(
                    f"unexpected argument {arguments[1]!r}: every option starts with --, see --help"
                )
            jax.config.update(
                "jax_compilation_cache_dir", str(cache_folder(FLAGS.cache_dir, "xla"))
            )
            experiment()
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("\ninterrupted: add --resume to go on from the last step", file=sys.stderr)
            sys.exit(130)

    def parse(arguments: list[str]) -> list[str]:
        try:
            return FLAGS(arguments)
        except flags.Error as error:
            print(f"error: {error}; --help lists the flags", file=sys.stderr)
            sys.exit(2)

    app.run(run, flags_parser=parse)


def command_line() -> str:
    """The command as it was typed, to go into the report."""
    module = sys.modules["__main__"].__spec__
    name = module.name if module else os.path.basename(sys.argv[0])
    return " ".join(["python", "-m", name, *sys.argv[1:]])
