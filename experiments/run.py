"""What every experiment shares: its folder, its clock, and how it ends."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import app, flags, logging

from edgespeech.data.corpus import cache_folder, write_atomically
from edgespeech.errors import InputError

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, plots, report.", required=True
)
flags.DEFINE_bool(
    "resume",
    False,
    "Go on with the run in --workdir; it must have been started with the same flags.",
)
flags.DEFINE_bool("quiet", False, "No progress on the terminal.")
flags.DEFINE_integer(
    "seed", 0, "Seed of parameters, data order, dropout and augmentation.", lower_bound=0
)
flags.DEFINE_string(
    "cache_dir",
    None,
    "Folder of what can be made again: synthetic speech, tables of lengths, compiled programs "
    "(default: the user's cache folder).",
)

# What may differ between a run and its continuation.
_FREE = {"workdir", "resume", "quiet", "cache_dir"}


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

    app.run(run)


class Workdir:
    """The folder of a run.

    Args:
        path: made when missing.
        settings: the flags that shape the run; written to `config.json`, and compared on `resume`.
        resume: go on with what is there.

    Raises:
        InputError: not writable; holds a run and `resume` is off; or it was started with other flags.
    """

    def __init__(self, path: str, settings: dict, resume: bool):
        self.path = Path(path)
        config = self.path / "config.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".writable").touch()
            (self.path / ".writable").unlink()
        except OSError as error:
            raise InputError(
                f"--workdir={path} cannot be written ({error.strerror}): name another folder"
            ) from error
        if config.exists():
            if not resume:
                raise InputError(
                    f"--workdir={path} holds a run already: add --resume to go on with it, or name another folder"
                )
            then = json.loads(config.read_text())
            changed = [
                k for k in sorted(then.keys() | settings.keys()) if then.get(k) != settings.get(k)
            ]
            if changed:
                what = "; ".join(
                    f"{k} was {then.get(k)!r}, is {settings.get(k)!r}" for k in changed
                )
                raise InputError(
                    f"--workdir={path} was started with other flags ({what}): name another folder"
                )
        else:
            self.write_json("config.json", settings)

    def write_json(self, name: str, value) -> None:
        """Writes a file whole or not at all."""
        text = json.dumps(value, indent=2, sort_keys=True) + "\n"
        write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def read_json(self, name: str, default=None):
        """The value in a file, or the default where there is none."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else default

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Says that a stage begins and adds its seconds, over all resumes, to `stages.json`."""
        if not FLAGS.quiet:
            print(f"== {name}", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            yield
        finally:
            stages = self.read_json("stages.json", {})
            stages[name] = stages.get(name, 0.0) + time.monotonic() - start
            # The order of first appearance is the order of the run.
            text = json.dumps(stages, indent=2) + "\n"
            write_atomically(self.path / "stages.json", lambda file: file.write(text.encode()))


def flag_settings() -> dict:
    """The values of the program's flags, less those that may differ on resume."""
    flag_list = FLAGS.get_key_flags_for_module(sys.argv[0])
    return {f.name: f.value for f in sorted(flag_list, key=lambda f: f.name) if f.name not in _FREE}


def command_line() -> str:
    """The command that runs this program again, without its folder."""
    module = sys.modules["__main__"].__spec__
    name = module.name if module else os.path.basename(sys.argv[0])
    return " ".join(["python", "-m", name, *sys.argv[1:]])
