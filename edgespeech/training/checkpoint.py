"""Checkpoints of a training stage: Orbax, with the position in the data."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from edgespeech.errors import InputError
from edgespeech.training.state import TrainState


class StageCheckpoints:
    """The checkpoints of one stage of a run, in `workdir/checkpoints/STAGE`.

    Saving is asynchronous. A run that is killed while it saves leaves the checkpoint before intact.

    Args:
        workdir: folder of the run.
        stage: name of the stage.
        settings: what the stage depends on, plain JSON; a checkpoint made under other settings is refused.
        keep: checkpoints to keep.
    """

    def __init__(self, workdir: Path, stage: str, settings: dict, keep: int = 2):
        self.path = (workdir / "checkpoints" / stage).resolve()
        self._settings = settings
        self._manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, state: TrainState) -> None:
        """Starts saving the state; the data's position is its step, the next batch to read."""
        step = int(state.step)
        if self._manager.latest_step() == step:
            return
        position = {"next_index": step, "settings": self._settings}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(jax.tree.leaves(state)),
                position=ocp.args.JsonSave(position),
            ),
        )

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state, with the shapes, dtypes and sharding of `like`; None if there is none.

        Raises:
            InputError: the checkpoint belongs to other settings or to another model.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        position = self._manager.restore(
            step, args=ocp.args.Composite(position=ocp.args.JsonRestore())
        )["position"]
        _require_same(self._settings, position["settings"], self.path)
        leaves, structure = jax.tree.flatten(like)
        # Compared first: Orbax would find out array by array, each with a page of its own on the terminal.
        found = [leaf.shape for leaf in jax.tree.leaves(self._manager.item_metadata(step).state)]
        if found != [leaf.shape for leaf in leaves]:
            raise InputError(
                f"the checkpoint {self.path}/{step} does not fit this model: it holds arrays of shapes "
                f"{found} and the model has {[leaf.shape for leaf in leaves]}; "
                "use the model settings it was made with, or another --workdir"
            )
        abstract = [ocp.utils.to_shape_dtype_struct(leaf) for leaf in leaves]
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]
        except (ValueError, KeyError) as error:
            raise InputError(
                f"the checkpoint {self.path}/{step} does not fit this model: {error}; "
                "use the model settings it was made with, or another --workdir"
            ) from error
        return jax.tree.unflatten(structure, restored)

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "StageCheckpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()


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
