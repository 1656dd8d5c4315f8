"""One process of a run of several, or a run on its own, as `experiments.program` would start it.

    python -m tests.training.worker WORKDIR JOB[,JOB] [--steps N] [--devices N] [--fsdp N] [--model_parallel N]
        [--slow SECONDS] [--idle SECONDS] [--coordinator=HOST:PORT --num_processes=N --process_id=I]

A job trains a tiny model, or converts one; process 0 leaves a trained model's state in WORKDIR/JOB.npz. Filler rows,
dropout and changes of speed take part. --idle: before the first job, the process does for so long what an evaluation
would. SIGUSR1 is an error of its own.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree

from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.training import distributed, stopping
from edgespeech.training.ctc import ctc_objective, weighted_mean
from edgespeech.training.loop import LoopConfig, train
from edgespeech.training.state import OptimizerConfig, init_state, make_optimizer, make_step
from edgespeech.training.stopping import Stopped
from edgespeech.training.watch import Watch
from tests.support.tiny import ToneCorpus, tiny_config, tiny_model

CTC_LAYERS = 2
BATCH = BatchConfig(batch_seconds=2.3, num_buckets=1, batch_multiple=4, speed_factors=(0.9, 1.0))


def plain():
    """Least squares with noise in the inputs: compiled in no time."""

    def loss(params, batch, key, step):
        del step
        seconds = batch.audio_lengths / 16_000
        x = jnp.stack([jnp.mean(jnp.abs(batch.audio), 1), seconds, jnp.ones_like(seconds)], 1)
        y = (x + jax.random.normal(key, x.shape)) @ params["w"] + params["b"]
        error = jnp.sum(jnp.square(y - batch.targets[:, :4]), 1)
        return weighted_mean(error, batch.weights), {}

    params = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(1)}
    return loss, params, None, BatchSource(ToneCorpus(), CharTokenizer(), BATCH)


def ctc():
    """The teacher of experiments.lpa_librispeech."""
    graphdef, params = nnx.split(tiny_model(num_layers=CTC_LAYERS))
    source = BatchSource(ToneCorpus(), CharTokenizer(), BATCH, tiny_config().num_frames)
    return ctc_objective(graphdef, (1,)), params, None, source


def splitformer():
    """Exits, with batch norms that see the rows of all processes."""
    from edgespeech.models.splitformer import Splitformer
    from edgespeech.training.exits import ExitLossConfig, exit_objective
    from tests.support.tiny_exits import exit_config

    config = exit_config(vocab_size=CharTokenizer().vocab_size, branches="none", num_mels=20)
    graphdef, params, statistics = nnx.split(
        Splitformer(config, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat
    )
    source = BatchSource(ToneCorpus(), CharTokenizer(), BATCH, config.num_frames)
    return exit_objective(graphdef, ExitLossConfig()), params, statistics, source


def sepformer():
    """Enhancement, with noise that is drawn for every utterance."""
    from edgespeech.data.mixtures import MixtureConfig, MixtureSource
    from edgespeech.data.noise import GeneratedNoise
    from edgespeech.models.sepformer import SepFormer, SepFormerConfig
    from edgespeech.training.enhancement import si_snr_objective

    config = SepFormerConfig(
        sample_rate=16_000,
        num_filters=12,
        width=8,
        chunk_length=100,
        num_blocks=1,
        num_intra_layers=1,
        num_inter_layers=1,
        num_heads=2,
        ffn_width=8,
    )
    graphdef, params = nnx.split(SepFormer(config, rngs=nnx.Rngs(0)))
    corpus = ToneCorpus()
    source = MixtureSource(corpus, GeneratedNoise(corpus), MixtureConfig(), BATCH)
    return si_snr_objective(graphdef), params, None, source


def edge():
    """The edge Conformer with its decoder; chunks are drawn at every step."""
    from edgespeech.models.edge_conformer import EdgeConformer
    from edgespeech.models.edge_conformer_config import EdgeConformerConfig
    from edgespeech.training.multitask import multitask_objective

    sizes = {"width": 8, "num_layers": 1, "num_heads": 2, "ffn_width": 8, "conv_kernel": 3}
    config = dataclasses.replace(
        EdgeConformerConfig.tiny(),
        **sizes,
        num_mels=20,
        chunk=2,
        left=1,
        decoder_layers=1,
        vocab_size=CharTokenizer().vocab_size,
    )
    model = EdgeConformer(config, rngs=nnx.Rngs(0))
    graphdef, params, other = nnx.split(model, nnx.Param, ...)
    source = BatchSource(ToneCorpus(), CharTokenizer(), BATCH, config.num_frames)
    return multitask_objective(graphdef, other, 4), params, None, source


MODELS = {
    "plain": plain,
    "ctc": ctc,
    "splitformer": splitformer,
    "sepformer": sepformer,
    "edge": edge,
}


def fit(job: str, model: str, workdir: Path, steps: int, config: LoopConfig, prepare=None):
    """Trains a model of `MODELS`; returns the state."""
    objective, params, extra, source = MODELS[model]()
    _, unravel = ravel_pytree(params)
    optimizer_config = OptimizerConfig(learning_rate=3e-3)
    optimizer = make_optimizer(optimizer_config, steps, params)
    return train(
        job,
        make_step(objective, unravel, optimizer, optimizer_config.average_decay),
        init_state(params, optimizer, extra),
        source,
        steps,
        workdir=workdir,
        settings={"steps": steps},
        seed=1,
        config=config,
        prepare=prepare,
    )


def convert_moonshine(workdir: Path, config: LoopConfig) -> None:
    """Sweep and replacement of a tiny Moonshine's first layer; the stages are `sweep_lpa` and `convert_lpa`."""
    from edgespeech.conversion.mixers import lpa_factory
    from edgespeech.conversion.run import Job, Progressive, Teacher, run_sweep
    from edgespeech.conversion.seq2seq_task import Seq2SeqDistilConfig, Seq2SeqTask
    from edgespeech.nn.lpa import LPAConfig
    from tests.support.moonshine_conversion import noise_source, talkative_moonshine

    model = talkative_moonshine()
    teacher = Teacher(model, Seq2SeqTask(model.config.bos_id, model.config.eos_id))
    job = Job(workdir, noise_source(batch_multiple=4), 1, config)
    lpa = LPAConfig(aperiodic=2, periodic=1, positional=1, kernel_size=3, local_kernel_size=3)
    heldout = [teacher.pairs(job.source.batch(0))]
    replacements, _ = run_sweep("lpa", teacher, lpa_factory(lpa), 3, heldout, job)
    distil = Seq2SeqDistilConfig(steps_per_layer=3)
    Progressive("lpa", teacher, replacements, (0,), distil, job).advance(1)


def run(job: str, arguments: argparse.Namespace) -> None:
    """A job is `moonshine`, or a model's name, perhaps with how it lies on the devices: `ctc.fsdp2`, `ctc.model2`."""
    name, _, layout = job.partition(".")
    config = LoopConfig(
        save_every=arguments.save_every,
        log_every=1,
        quiet=True,
        fsdp=int(layout[4:]) if layout.startswith("fsdp") else 1,
        model_parallel=int(layout[5:]) if layout.startswith("model") else 1,
    )
    if name == "moonshine":
        convert_moonshine(arguments.workdir, config)
        return

    def wait(batch):
        # Cut short when all are told to stop.
        deadline = time.monotonic() + arguments.slow
        while time.monotonic() < deadline and not stopping.current()._answered:
            time.sleep(0.01)
        return batch

    state = fit(job, name, arguments.workdir, arguments.steps, config, wait)
    if jax.process_index() == 0:
        leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        np.savez(arguments.workdir / f"{job}.npz", **leaves)


def fail(number, frame) -> None:
    raise OSError("the disk is gone")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("jobs")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--save_every", type=int, default=3)
    parser.add_argument("--devices", type=int)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--idle", type=float, default=0.0)
    parser.add_argument("--heartbeat_seconds", type=float, default=60.0)
    parser.add_argument("--coordinator")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    arguments = parser.parse_args()
    if arguments.devices:
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    place = distributed.find_place(
        arguments.coordinator, arguments.num_processes, arguments.process_id, {}
    )
    if place is not None:
        distributed.start(place, arguments.heartbeat_seconds)
    signal.signal(signal.SIGUSR1, fail)
    with Watch(arguments.heartbeat_seconds) as watch:
        try:
            print("ready", flush=True)
            deadline = time.monotonic() + arguments.idle
            while time.monotonic() < deadline:
                json.dumps(os.getpid())
            for job in arguments.jobs.split(","):
                run(job, arguments)
        except (Stopped, Exception) as error:
            status = 0 if isinstance(error, Stopped) else 1
            print(repr(error), file=sys.stderr, flush=True)
            if not watch.together:
                sys.exit(status)
            watch.explain(error)
            watch.leave(status, repr(error))


if __name__ == "__main__":
    main()
