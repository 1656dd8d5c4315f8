"""The folder and the clock of a run."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from edgespeech.data.corpus import write_atomically
from edgespeech.errors import InputError
from experiments import program

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)

flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, plots, report.", required=True
)
flags.DEFINE_bool(
    "resume",
    False,
    "Go on with the run in --workdir; it must have been started with the same flags.",
)
flags.DEFINE_integer(
    "seed", 0, "Seed of parameters, data order, dropout and augmentation.", lower_bound=0
)
# What may differ between a run and its continuation.
_FREE = {"workdir", "resume", "quiet", "cache_dir"}


def say(text: str) -> None:
    """Prints unless --quiet."""
    if not FLAGS.quiet:
        print(text, flush=True)


class Workdir:
    """The folder of a run.

    Args:
        path: made when missing.
        settings: the flags that shape the run; `begin` writes them to `config.json`, and `resume` compares.
        resume: go on with what is there.

    Raises:
        InputError: not writable; holds a run and `resume` is off; or it was started with other flags.
    """

    def __init__(self, path: str, settings: dict, resume: bool):
        self.path = Path(path)
        self._settings = settings
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

    def begin(self) -> None:
        """From here on the folder belongs to these flags: call it when the data has proved usable."""
        self.write_json("config.json", self._settings)

    def write_json(self, name: str, value) -> None:
        """Writes a file whole or not at all."""
        text = json.dumps(value, indent=2, sort_keys=True) + "\n"
        write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def read_json(self, name: str) -> dict:
        """The object in a file, empty where there is none."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Says that a stage begins and adds its seconds, over all resumes, to `stages.json`."""
        if not FLAGS.quiet:
            print(f"== {name}", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            yield
        finally:
            stages = self.read_json("stages.json")
            stages[name] = stages.get(name, 0.0) + time.monotonic() - start
            # The order of first appearance is the order of the run.
            text = json.dumps(stages, indent=2) + "\n"
            write_atomically(self.path / "stages.json", lambda file: file.write(text.encode()))


def flag_settings() -> dict:
    """The values of the program's flags, less those that may differ on resume."""
    flag_list = FLAGS.get_key_flags_for_module(sys.argv[0])
    return {f.name: f.value for f in sorted(flag_list, key=lambda f: f.name) if f.name not in _FREE}
