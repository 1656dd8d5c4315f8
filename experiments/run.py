"""The folder and the clock of a run.

Where there are several processes, each does the whole run: they train together, and everything else, evaluation too,
each does for itself. The folder is process 0's; the others have one of their own in the temporary folder, with what the
run's folder held at the start, so that all find the same done already. They share its checkpoints.
"""

import atexit
import contextlib
import getpass
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags

from edgespeech.data.corpus import write_atomically
from edgespeech.errors import InputError
from edgespeech.training.distributed import barrier
from experiments import distributed_flags, program

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)
flags.adopt_module_key_flags(distributed_flags)

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
flags.DEFINE_integer(
    "batch_multiple",
    None,
    "The rows of a batch are a multiple of this, and its devices must divide it on every number of hosts that the run "
    "is to go on with (default: the devices that it starts with).",
    lower_bound=1,
)
# What may differ between a run and its continuation.
_FREE = {"workdir", "resume", "quiet", "cache_dir"} | distributed_flags.FREE
# Only process 0 needs what is in these.
_NOT_COPIED = (
    "checkpoints",
    "metrics",
    "timing",
    "tensorboard",
    "plots",
    "skipped",
    "profile",
    "wandb",
)


def say(text: str) -> None:
    """Prints unless --quiet."""
    if not FLAGS.quiet:
        print(text, flush=True)


def batch_multiple() -> int:
    """What the rows of a batch are a multiple of: --batch_multiple, else that of the run to resume, else the devices.

    Raises:
        InputError: the devices do not divide it.
    """
    devices = jax.device_count() // FLAGS.model_parallel
    if FLAGS.batch_multiple is None:
        config = Path(FLAGS.workdir) / "config.json"
        then = json.loads(config.read_text()) if FLAGS.resume and config.exists() else {}
        FLAGS.batch_multiple = then.get("batch_multiple") or max(1, devices)
    if FLAGS.batch_multiple % max(1, devices):
        raise InputError(
            f"the rows of a batch are a multiple of {FLAGS.batch_multiple}, and there are {devices} devices for them: "
            "use a number of devices that divides it; a new run takes --batch_multiple"
        )
    return FLAGS.batch_multiple


class Workdir:
    """The folder of a run.

    Args:
        path: made when missing.
        settings: the flags that shape the run; `begin` writes them to `config.json`, and `resume` compares.
        resume: go on with what is there.

    Raises:
        InputError: not writable; holds a run and `resume` is off; or it was started with other flags.

    Attributes:
        path: see above; of a process other than the first, its own.
    """

    def __init__(self, path: str, settings: dict, resume: bool):
        self.path = Path(path)
        self._settings = settings
        config = self.path / "config.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable_{jax.process_index()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"--workdir={path} cannot be written ({error.strerror}): name another folder"
            ) from error
        if config.exists():
            if not resume:
                raise InputError(
                    f"--workdir={path} holds a run already: add --resume to go on with it, or name another folder"
                )
            # Older runs do not name it.
            then = {"batch_multiple": settings.get("batch_multiple")} | json.loads(
                config.read_text()
            )
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

        # All have looked before process 0 begins, and copied before it goes on.
        barrier("workdir/checked")
        if jax.process_index() > 0:
            self.path = _copy(self.path.resolve())
        barrier("workdir/copied")

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


def _copy(path: Path) -> Path:
    """A folder for a process other than the first, with the run's checkpoints and a copy of what they grew from."""
    name = hashlib.sha256(f"{path} {jax.process_index()}".encode()).hexdigest()[:16]
    # Always the same for a run: one that a killed process leaves behind is found and replaced.
    copy = Path(tempfile.gettempdir()) / f"edgespeech_{getpass.getuser()}_{name}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(
        path, copy, ignore=lambda folder, _: _NOT_COPIED if Path(folder) == path else ()
    )
    (copy / "checkpoints").symlink_to(path / "checkpoints")
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    return copy


def flag_settings() -> dict:
    """The values of the program's flags, less those that may differ on resume."""
    flag_list = FLAGS.get_key_flags_for_module(sys.argv[0])
    return {f.name: f.value for f in sorted(flag_list, key=lambda f: f.name) if f.name not in _FREE}
