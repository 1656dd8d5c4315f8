"""Weights & Biases, for those who have it: the package is optional."""

import contextlib
import importlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgespeech.data.corpus import write_atomically
from edgespeech.errors import InputError

Log = Callable[[int, Mapping[str, float]], None]


def require_wandb(project: str | None) -> None:
    """Refuses a project where the package is missing.

    Raises:
        InputError: it is missing.
    """
    if project is not None and find_spec("wandb") is None:
        raise InputError(
            f"--wandb_project={project} needs a package that is not installed: pip install 'edgespeech[wandb]', or "
            "leave the flag out"
        )


@contextlib.contextmanager
def wandb_log(project: str | None, workdir: Path, stage: str, first: int) -> Iterator[Log | None]:
    """A run of Weights & Biases for one stage of a run, in the group that has the name of the run's folder.

    What it keeps on the disk is in `workdir/wandb`. A stage that goes on goes on there too: rows of steps that the
    run there has already are dropped by it, and are equal. The variables of Weights & Biases hold:
    `WANDB_MODE=offline` sends nothing.

    Args:
        project: None: no log.
        workdir: folder of the run.
        stage: name of the stage.
        first: the first step of this start; 0 begins anew.

    Yields:
        `log(step, values)`, to be called with ascending steps; values of one step may come in parts.

    Raises:
        InputError: Weights & Biases refuses the run.
    """
    if project is None:
        yield None
        return
    wandb: Any = importlib.import_module("wandb")

    id_path = workdir / "wandb" / f"{stage}.id"
    if first == 0 or not id_path.exists():
        id_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(id_path, lambda file: file.write(uuid.uuid4().hex[:16].encode()))
    name = workdir.resolve().name
    try:
        run = wandb.init(
            project=project,
            group=name,
            name=f"{name}/{stage}",
            id=id_path.read_text(),
            resume="allow",
            dir=workdir,
            reinit="create_new",
        )
    except wandb.Error as error:
        raise InputError(
            f"--wandb_project={project}: {error}; the fix: `wandb login`, WANDB_MODE=offline, or leave the flag out"
        ) from error
    status = 1
    try:
        yield lambda step, values: run.log(dict(values), step=step)
        status = 0
    finally:
        run.finish(exit_code=status)
