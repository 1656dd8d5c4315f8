"""What runs with some equal flags share: the rows of an ablation have one teacher, and many of them one sweep."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
from absl import flags

from edgespeech.errors import InputError
from experiments import run

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "shared",
    None,
    "Folder in which runs of one --teacher share what does not depend on their other flags: its labels, its score on "
    "the test splits, and LPA's sweep. What is there under the same flags is taken for right (default: no sharing).",
)

Part = Literal["labels", "score", "sweep"]
_DATA = ("teacher", "data", "data_dir", "model.padding")
_NOT_IN_SWEEP = {
    *("controls", "max_test_hours", "order", "replaced", "save_every", "shared", "test_split"),
    "window",
}


def place(name: Part) -> Path | None:
    """The folder of a part, the same for all runs that have the flags in common which it depends on; None: no sharing.

    Raises:
        InputError: --teacher is not given, or there are several processes.
    """
    if FLAGS.shared is None:
        return None
    if not FLAGS.teacher:
        raise InputError(
            f"--shared={FLAGS.shared} is for runs of one teacher: name it, --teacher=DIR, such as WORKDIR/teacher of a "
            "run that trained it"
        )
    if jax.process_count() > 1:
        raise InputError(f"--shared={FLAGS.shared} is for runs of one process: leave it out")
    text = json.dumps(_depends_on(name), sort_keys=True)
    return Path(FLAGS.shared) / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _depends_on(name: Part) -> dict:
    """The flags that a part depends on."""
    settings = run.flag_settings()

    def chosen(*names: str) -> dict:
        found = {k: v for k, v in settings.items() if k in names or k.startswith("synthetic.")}
        # Synthetic voices are drawn by it.
        return found | ({"seed": settings["seed"]} if settings["data"] == "synthetic" else {})

    if name == "labels":
        return chosen(*_DATA, "more_train")
    if name == "score":
        return chosen(*_DATA, "test_split", "max_test_hours")
    in_sweep = ("distil.init", "distil.curriculum")
    return {
        k: v
        for k, v in settings.items()
        if k in in_sweep or not (k in _NOT_IN_SWEEP or k.startswith("distil."))
    }


@contextlib.contextmanager
def part(name: Part, workdir: Path, pattern: str) -> Iterator[None]:
    """Brings what an earlier run left of a part into the workdir; after the body, the first run leaves its own.

    Args:
        name: of the part.
        workdir: of the run; what is in it already stays.
        pattern: of the part's files and folders in it.
    """
    folder = place(name)
    if folder is None:
        yield
        return
    _copy(folder, workdir, pattern)
    yield
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        _copy(workdir, made, pattern)
        try:
            os.rename(made, folder)
        except OSError:  # another run was first
            shutil.rmtree(made)


def _copy(source: Path, target: Path, pattern: str) -> None:
    for path in sorted(source.glob(pattern)):
        to = target / path.relative_to(source)
        if not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, to)
