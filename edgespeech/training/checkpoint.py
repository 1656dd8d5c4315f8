"""Checkpoints of a training stage: Orbax, with the position in the data and a fingerprint of every array."""

import itertools
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from edgespeech.errors import InputError
from edgespeech.training.distributed import barrier
from edgespeech.training.fingerprint import fingerprint, fingerprint_of_array
from edgespeech.training.state import TrainState

_names = itertools.count()


class StageCheckpoints:
    """The checkpoints of one stage of a run, in `workdir/checkpoints/STAGE`.

    Saving is asynchronous, and all processes take part. A run that is killed while it saves leaves the checkpoint
    before intact. One that cannot be written, on a full disk say, is given up and said so; training goes on.

    Args:
        workdir: folder of the run, the same for all processes.
        stage: name of the stage.
        settings: what the stage depends on, plain JSON; a checkpoint made under other settings is refused.
        keep: checkpoints to keep.

    Attributes:
        failure: why the newest save did not succeed; None where it did, as far as is known before `finish`.
    """

    def __init__(self, workdir: Path, stage: str, settings: dict, keep: int = 2):
        self.path = (workdir / "checkpoints" / stage).resolve()
        self.failure: str | None = None
        self._settings = settings
        self._keep = keep
        self._saving: int | None = None
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, state: TrainState, vector_size: int | None = None) -> None:
        """Starts saving the state; the data's position is its step, the next batch to read.

        Args:
            state: on the devices of all processes.
            vector_size: length of the parameters without the zeros that `Layout` puts after their end; None: there are
                none.
        """
        step = int(state.step)
        self.finish()
        if self._manager.latest_step() == step:
            return
        leaves = jax.tree.leaves(state)
        position = {
            "next_index": step,
            "settings": self._settings,
            "vector_size": vector_size,
            "fingerprints": [int(number) for number in jax.device_get(fingerprint(leaves))],
        }
        self._saving, self.failure = step, None
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(leaves), position=ocp.args.JsonSave(position)
                ),
            )
        except Exception as error:
            self._give_up(error)

    def finish(self) -> None:
        """Waits until the newest save is written, or has failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Says so, and takes what there is of the checkpoint off the disk."""
        step, self._saving = self._saving, None
        self.failure = f"the checkpoint {self.path}/{step} could not be written: {error}"
        if jax.process_index() == 0:
            for part in (self.path / str(step), *self.path.glob(f"{step}.*")):
                shutil.rmtree(part, ignore_errors=True)
        # The manager raises the error of a save again with every one that follows.
        self._manager = self._open()
        newest = self._manager.latest_step()
        kept = "there is none before it" if newest is None else f"the newest is of step {newest}"
        _say(f"{self.failure}; {kept}")

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state that is intact, as every process reads it for itself; None if there is none.

        One that cannot be read, or that does not have its fingerprints, is moved to `checkpoints/STAGE.damaged` and
        said so.

        Args:
            like: has the shapes and dtypes.

        Raises:
            InputError: the checkpoint belongs to other settings or to another model.
        """
        damaged = []
        state = None
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._read(step, like)
                break
            except _DamagedError as error:
                damaged.append(step)
                _say(f"the checkpoint {self.path}/{step} is damaged: {error}")
        if damaged:
            number = next(_names)
            barrier(f"damaged/{number}")
            if jax.process_index() == 0:
                self._set_aside(damaged)
            barrier(f"set_aside/{number}")
            self._manager.reload()
            _say(
                "going on without any checkpoint of this stage, from its beginning"
                if state is None
                else f"going on from the one before it, of step {int(state.step)}"
            )
        return state

    def _set_aside(self, steps: list[int]) -> None:
        folder = self.path.with_name(f"{self.path.name}.damaged")
        folder.mkdir(exist_ok=True)
        for step in steps:
            shutil.rmtree(folder / str(step), ignore_errors=True)
            shutil.move(self.path / str(step), folder / str(step))

    def _read(self, step: int, like: TrainState) -> TrainState:
        folder = self.path / str(step)
        position = _load(ocp.JsonCheckpointHandler(), folder / "position", ocp.args.JsonRestore())
        _require_same(self._settings, position["settings"], self.path)
        leaves, structure = jax.tree.flatten(like)
        handler = ocp.StandardCheckpointHandler()
        try:
            found = [
                leaf.shape
                for leaf in jax.tree.leaves(handler.metadata(epath.Path(folder / "state")))
            ]
        except Exception as error:
            raise _DamagedError(error) from error
        wanted = [leaf.shape for leaf in leaves]
        vector = (position.get("vector_size"),)
        fits = len(found) == len(wanted) and all(
            f == w or (w == vector and len(f) == 1 and f > w)
            for f, w in zip(found, wanted, strict=True)
        )
        if not fits:
            raise InputError(
                f"the checkpoint {folder} does not fit this model: it holds arrays of shapes "
                f"{found} and the model has {wanted}; "
                "use the model settings it was made with, or another --workdir"
            )
        like_file = [np.empty(shape, leaf.dtype) for shape, leaf in zip(found, leaves, strict=True)]
        arrays = _load(handler, folder / "state", ocp.args.StandardRestore(like_file))
        # Checkpoints older than the fingerprints have none.
        for expected, array in zip(position.get("fingerprints", ()), arrays, strict=False):
            if fingerprint_of_array(array) != expected:
                raise _DamagedError("its numbers are not those that were saved")
        whole = [
            array[: leaf.shape[0]] if leaf.ndim == 1 else array
            for array, leaf in zip(arrays, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, whole)

    def close(self) -> None:
        """Waits until everything is written."""
        self.finish()
        self._manager.close()

    def __enter__(self) -> "StageCheckpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        # After an error of one process the others may never come to where Orbax meets them.
        if kind is None or jax.process_count() == 1:
            self.close()


class _DamagedError(Exception):
    pass


def _load(handler: ocp.CheckpointHandler, folder: Path, arguments: ocp.args.CheckpointArgs):
    """What is in a folder, read by this process alone."""
    here = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process_{here}"
    )
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
            return checkpointer.restore(folder, args=arguments)
    except Exception as error:
        raise _DamagedError(" ".join(str(error).split())[:300]) from error


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def _require_same(now: dict, then: dict, path: Path) -> None:
    differing = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name)
    ]
    if differing:
        raise InputError(
            f"the checkpoints in {path} were made with other settings ({'; '.join(differing)}): "
            "give the same flags to --resume, or another --workdir"
        )
