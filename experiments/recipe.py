"""How a teacher is converted: the flags of every conversion program."""

import dataclasses
from typing import get_args

from absl import flags

from edgespeech.conversion.distil import DistilConfig
from edgespeech.conversion.mixers import CONTROLS, DEFAULT_CONTROLS
from edgespeech.conversion.run import ReplacementOrder
from edgespeech.errors import InputError
from edgespeech.nn.lpa import LPAConfig
from edgespeech.training.loop import LoopConfig
from experiments import distributed_flags, run, shared
from experiments.flags import define_config, int_list, read_config

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(run)
flags.adopt_module_key_flags(shared)

define_config("lpa", LPAConfig())
flags.DEFINE_integer(
    "sweep_steps", 150, "Updates of every layer's replacement in the sweep.", lower_bound=1
)
flags.DEFINE_enum(
    "order",
    "mse",
    get_args(ReplacementOrder),
    "Which layers go first: those with the least error in the sweep, absolute or as a share of the variance; the first "
    "or the last; or a random order.",
)
flags.DEFINE_list("replaced", ["2", "4", "6", "8"], "Numbers of replaced layers to report.")
flags.DEFINE_list(
    "controls",
    list(DEFAULT_CONTROLS),
    f"Controls at the largest number of --replaced: 'all', 'none', or some of {', '.join(CONTROLS)}.",
)
flags.DEFINE_integer(
    "window", 8, "Frames to each side that the sliding_window control sees.", lower_bound=1
)
flags.DEFINE_integer("save_every", 200, "Updates between checkpoints.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the teacher is converted.

    Attributes:
        lpa: the mixer that takes attention's place.
        distil: see `DistilConfig`.
        order: see `replacement_order`.
        replaced: numbers of replaced layers to report, ascending.
        controls: names of the controls at the largest of them.
        window: frames to each side that the sliding-window control sees.
        sweep_steps: updates of every layer's replacement in the sweep.
        seed: of new parameters and of the steps.
        loop: see `LoopConfig`.
    """

    lpa: LPAConfig
    distil: DistilConfig
    order: ReplacementOrder
    replaced: tuple[int, ...]
    controls: tuple[str, ...]
    window: int
    sweep_steps: int
    seed: int
    loop: LoopConfig


def read_recipe(distil: DistilConfig, num_layers: int, lpa: LPAConfig | None = None) -> Recipe:
    """The recipe that the flags describe, for a model of so many layers.

    Args:
        distil: its part of it.
        num_layers: with a mixer.
        lpa: what --lpa.* change; None: the default.

    Raises:
        InputError: a value is out of range.
    """
    replaced = int_list("replaced", 1, num_layers)
    if not replaced:
        raise InputError("--replaced is empty: give at least one number of layers")
    return Recipe(
        lpa=read_config("lpa", lpa or LPAConfig()),
        distil=distil,
        order=FLAGS.order,
        replaced=replaced,
        controls=tuple(chosen_controls()),
        window=FLAGS.window,
        sweep_steps=FLAGS.sweep_steps,
        seed=FLAGS.seed,
        loop=distributed_flags.loop_config(),
    )


def chosen_controls() -> list[str]:
    """The names in --controls.

    Raises:
        InputError: a name is not known.
    """
    names = list(FLAGS.controls)
    if names == ["all"]:
        return list(CONTROLS)
    if names in ([], ["none"]):
        return []
    for name in names:
        if name not in CONTROLS:
            raise InputError(
                f"--controls holds {name!r}: choose 'all', 'none', or from {', '.join(CONTROLS)}"
            )
    return names
