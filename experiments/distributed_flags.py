"""How a training program runs on several hosts: its flags, and the settings they make."""

import contextlib
from collections.abc import Iterator

import jax
from absl import flags

from edgespeech.training import distributed
from edgespeech.training.loop import LoopConfig
from edgespeech.training.wandb_log import require_wandb
from edgespeech.training.watch import Watch

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, which all others can reach; with --num_processes and --process_id. Without the three, "
    "SLURM, Kubernetes or the TPU is asked; a program that is alone needs none of this.",
)
flags.DEFINE_integer("num_processes", None, "Processes of the run, on all hosts.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
flags.DEFINE_float(
    "heartbeat_seconds",
    100.0,
    "Without a sign of life after which a process counts as dead, and the others stop.",
    lower_bound=2.0,
)
flags.DEFINE_integer(
    "fsdp", 1, "Parts that parameters and optimiser are cut into over the devices.", lower_bound=1
)
flags.DEFINE_integer(
    "model_parallel",
    1,
    "Parts that the columns of the weights are cut into over the devices of a host.",
    lower_bound=1,
)
flags.DEFINE_float(
    "watchdog_minutes",
    0.0,
    "Print the stacks of all threads when no step ends in so many minutes; 0: never.",
    lower_bound=0.0,
)
flags.DEFINE_bool(
    "remat",
    False,
    "Compute the inside of every layer again in the backward pass: less memory, a third more compute.",
)
flags.DEFINE_integer(
    "data_threads",
    2,
    "Threads that decode audio; as many batches, and one, are made ahead.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "profile_steps",
    0,
    "Trace so many steps of every stage into WORKDIR/profile/STAGE, for TensorBoard or ui.perfetto.dev.",
    lower_bound=0,
)
flags.DEFINE_integer(
    "profile_from",
    5,
    "The first traced step, counted from where a stage is started or resumed.",
    lower_bound=0,
)
flags.DEFINE_string(
    "wandb_project",
    None,
    "Send what TensorBoard shows to this project of Weights & Biases as well (pip install 'edgespeech[wandb]'); "
    "WANDB_MODE=offline keeps it in WORKDIR/wandb.",
)

# What may differ between a run and its continuation.
FREE = {
    "coordinator",
    "num_processes",
    "process_id",
    "heartbeat_seconds",
    "fsdp",
    "model_parallel",
    "watchdog_minutes",
    "remat",
    "data_threads",
    "profile_steps",
    "profile_from",
    "wandb_project",
}


@contextlib.contextmanager
def joined() -> Iterator[Watch]:
    """Joins the other processes, if there are, and watches over the program: see `Watch`.

    Raises:
        InputError: settings that are half given or do not go together, or a package that a flag needs is missing.
    """
    require_wandb(FLAGS.wandb_project)
    place = distributed.find_place(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    if place is not None:
        distributed.start(place, FLAGS.heartbeat_seconds)
    # One voice is enough.
    if jax.process_index() > 0:
        FLAGS.quiet = True
    with Watch(FLAGS.heartbeat_seconds) as watch:
        yield watch


def loop_config() -> LoopConfig:
    """The `LoopConfig` that the flags describe."""
    return LoopConfig(
        save_every=FLAGS.save_every,
        quiet=FLAGS.quiet,
        fsdp=FLAGS.fsdp,
        model_parallel=FLAGS.model_parallel,
        watchdog_minutes=FLAGS.watchdog_minutes,
        threads=FLAGS.data_threads,
        remat=FLAGS.remat,
        profile_steps=FLAGS.profile_steps,
        profile_from=FLAGS.profile_from,
        wandb_project=FLAGS.wandb_project,
    )
