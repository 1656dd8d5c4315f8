"""A training run of its own process: a test kills it, or gives it several devices.

python -m tests.support.train_tiny WORKDIR [--steps N] [--devices N] [--slow]
"""

import argparse
import itertools
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree

from edgespeech.training.ctc import ctc_objective
from edgespeech.training.loop import LoopConfig, train
from edgespeech.training.state import (
    OptimizerConfig,
    TrainState,
    init_state,
    make_optimizer,
    make_step,
)
from tests.support.tiny import tiny_model, tone_source


def run(
    workdir: Path, steps: int, slow: bool = False, prepare=None, total: int = 0, quiet: bool = True
) -> TrainState:
    """Trains the tiny model with dropout and SpecAugment, saving every third step and logging every one.

    `total` is the length of the schedule, by default the number of steps.
    """
    model = tiny_model()
    graphdef, params = nnx.split(model)
    _, unravel = ravel_pytree(params)
    config = OptimizerConfig(learning_rate=3e-3)
    optimizer = make_optimizer(config, total or steps, params)

    def wait(batch):
        # Whoever kills the run has ten minutes for it.
        time.sleep(0.15 if next(calls) < steps - 1 else 600)
        return batch

    calls = itertools.count()

    return train(
        "teacher",
        make_step(ctc_objective(graphdef, (1,)), unravel, optimizer, config.average_decay),
        init_state(params, optimizer),
        tone_source(batch_multiple=4),
        steps,
        workdir=workdir,
        settings={"steps": total or steps},
        seed=1,
        config=LoopConfig(save_every=3, log_every=1, quiet=quiet),
        prepare=wait if slow else prepare,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--slow", action="store_true")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    state = run(arguments.workdir, arguments.steps, arguments.slow)
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    np.savez(arguments.workdir / "state.npz", **leaves)


if __name__ == "__main__":
    main()
