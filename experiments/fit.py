"""Training a model from scratch, whatever its loss."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.flatten_util import ravel_pytree

from edgespeech.data.batching import Batch
from edgespeech.training.loop import LoopConfig, train
from edgespeech.training.state import (
    LossFunction,
    OptimizerConfig,
    StatefulLossFunction,
    checkpoint_settings,
    init_state,
    make_optimizer,
    make_step,
)


def fit(
    stage: str,
    loss: LossFunction | StatefulLossFunction,
    params: Any,
    source: Any,
    num_steps: int,
    *,
    workdir: Path,
    settings: dict[str, Any],
    optimizer: OptimizerConfig,
    seed: int,
    loop: LoopConfig,
    extra: Any = None,
    prepare: Callable[[Batch], Any] | None = None,
) -> tuple[Any, Any]:
    """The moving average of the parameters after training, and the `extra` of the state; resumable, see `train`.

    Args:
        stage: names checkpoints, metrics and progress.
        loss: see `make_step`.
        params: to start from.
        source: batches by step.
        num_steps: updates in all.
        workdir: of the run.
        settings: what a checkpoint must have been made with, besides steps and optimiser.
        optimizer: see `OptimizerConfig`.
        seed: of the random numbers of all steps.
        loop: see `LoopConfig`.
        extra: see `TrainState`.
        prepare: see `train`.
    """
    _, unravel = ravel_pytree(params)
    transformation = make_optimizer(optimizer, num_steps, params)
    own = checkpoint_settings(optimizer, newer=("accumulate",))
    settings = {"steps": num_steps, **settings, "optimizer": own}
    state = train(
        stage,
        make_step(loss, unravel, transformation, optimizer.average_decay),
        init_state(params, transformation, extra),
        source,
        num_steps,
        workdir=workdir,
        settings=json.loads(json.dumps(settings)),
        seed=seed,
        config=loop,
        prepare=prepare,
    )
    return unravel(state.average), state.extra
