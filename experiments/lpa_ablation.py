"""Ablation of LPA on one teacher: which part of the recipe does the work, each changed alone, at equal budgets.

Command     python -m experiments.lpa_ablation --workdir=runs/ablation --plan=moonshine
            writes runs/ablation/rows.json, the settings, and says the command that runs them; after that, or
            while it runs,
            python -m experiments.lpa_ablation --workdir=runs/ablation
Hardware    none to speak of; the rows are runs of experiments.lpa_moonshine or lpa_librispeech, each at its cost
Expect      runs/ablation/ablation.md and ablation.json: WER with so many layers replaced, the paired difference from
            the default row and from the teacher, the spread over seeds, parameters trained, and every row's command

The rows are run by launch.sweep, one after the other or on a cluster; rows that are finished stay. With --shared they
share the teacher's labels, its score and equal sweeps. rows.json may be edited: a row is a name and its flags.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from edgespeech.data.corpus import write_atomically
from edgespeech.errors import InputError
from experiments import (
    program,
    recipe,  # noqa: F401  for its flags
    run,  # noqa: F401
)
from experiments.ablation_table import DEFAULT, write_tables
from experiments.flags import int_list

FLAGS = flags.FLAGS
PULSES = ("lpa.aperiodic", "lpa.periodic", "lpa.positional")
flags.adopt_module_key_flags(program)
flags.declare_key_flag("workdir")
flags.declare_key_flag("replaced")
flags.declare_key_flag("sweep_steps")
flags.declare_key_flag("window")


class Plan(NamedTuple):
    """A program whose rows are built in.

    Attributes:
        module: of the program.
        steps_per_layer: its default.
        labels: its weight of the loss on the labels.
        windows: octaves of its LPA's windows around every frame, 0 for none.
        hours: its flag of the hours that are trained on, if it has one.
    """

    module: str
    steps_per_layer: int
    labels: str
    windows: int
    hours: str | None = None


PLANS = {
    "moonshine": Plan("experiments.lpa_moonshine", 200, "cross_entropy", 4, "max_train_hours"),
    "ctc": Plan("experiments.lpa_librispeech", 36, "ctc", 0),
}

flags.DEFINE_enum(
    "plan", None, sorted(PLANS), "Write rows.json for this program; without it, write the tables."
)
flags.DEFINE_list(
    "rows",
    ["all"],
    "With --plan: rows to write, in this order; 'all' is every built-in one.",
)
flags.DEFINE_list(
    "rivals",
    ["all"],
    f"With --plan: --controls of the row {DEFAULT}; each costs as much as a row.",
)
flags.DEFINE_integer(
    "steps_per_layer",
    None,
    "With --plan: updates of a layer's window in every row but `joint` (default: the program's).",
    lower_bound=4,
)
flags.DEFINE_float(
    "hours", 5.0, "With --plan=moonshine: hours that are trained on.", lower_bound=0.0
)


def experiment() -> None:
    """Writes the rows or the tables."""
    workdir = Path(FLAGS.workdir)
    if FLAGS.plan is None:
        path = write_tables(workdir)
        print(f"tables: {path}")
        return
    plan = PLANS[FLAGS.plan]
    rows = planned_rows(
        plan,
        FLAGS.steps_per_layer or plan.steps_per_layer,
        FLAGS.sweep_steps,
        int_list("replaced", 1, 1000),
        ",".join(FLAGS.rivals),
        FLAGS.window,
        FLAGS.hours,
    )
    rows = chosen_rows(rows, FLAGS.rows)
    path = workdir / "rows.json"
    text = json.dumps(rows, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    print(f"{len(rows)} rows: {path}\nrun them, with your data and --teacher after the dashes:\n")
    command = ["python", "-m", "launch.sweep", f"--experiment={plan.module}"]
    command += [f"--workdir={workdir}", f"--rows={path}", "--sweep=seed=0..2", "--"]
    command += [f"--shared={workdir / 'shared'}"]
    print(f"    {shlex.join(command)} --data=...")


def planned_rows(
    plan: Plan,
    steps_per_layer: int,
    sweep_steps: int,
    replaced: tuple[int, ...],
    controls: str,
    window: int,
    hours: float,
) -> dict[str, dict[str, Any]]:
    """The built-in rows, the most telling first: flags by name, all with the same number of updates.

    Args:
        plan: the program.
        steps_per_layer: updates of a layer's window.
        sweep_steps: of the sweep.
        replaced: numbers of layers to report; the controls stand at the last.
        controls: of the default row, as on the command line.
        window: of sliding-window attention, frames to each side.
        hours: that are trained on, for a program that has a flag for it.
    """
    short = steps_per_layer * 3 // 4
    joint = {
        "distil.steps_per_layer": short,
        "distil.joint_steps": replaced[-1] * (steps_per_layer - short),
    }
    changes: dict[str, dict[str, Any]] = {
        DEFAULT: {"controls": controls, "window": window},
        ("windows", "no_windows")[plan.windows > 0]: {"lpa.octaves": 0 if plan.windows else 4},
        "windows_only": {"lpa.octaves": 4} | dict.fromkeys(PULSES, 0),
        "readout_content": {"lpa.readout": "content"},
        "runs": {"lpa.aperiodic": 0, "lpa.runs": 8},
        "rectangles_and_runs": {"lpa.aperiodic": 4, "lpa.runs": 4},
        "joint": joint,
        "random_init": {"distil.init": "random"},
        "fitted_init": {"distil.init": "fit"},
        "no_curriculum": {"distil.curriculum": False},
        "no_co_adaptation": {"distil.co_adapt": False},
        "no_kl": {"distil.kl": 0},
        "no_hidden": {"distil.hidden": 0},
        "no_labels": {f"distil.{plan.labels}": 0},
        "no_aperiodic": {"lpa.aperiodic": 0},
        "no_periodic": {"lpa.periodic": 0},
        "no_positional": {"lpa.positional": 0},
        "pulses_half": {"lpa.aperiodic": 4, "lpa.periodic": 2, "lpa.positional": 2},
        "pulses_double": {"lpa.aperiodic": 16, "lpa.periodic": 8, "lpa.positional": 8},
        "kernel_1": {"lpa.kernel_size": 1},
        "kernel_31": {"lpa.kernel_size": 31},
        "no_local": {"lpa.local": False},
        "local_31": {"lpa.local_kernel_size": 31},
        "order_relative": {"order": "relative_mse"},
        "order_forward": {"order": "forward"},
        "order_backward": {"order": "backward"},
        "order_random": {"order": "random"},
    }
    budget: dict[str, Any] = {
        "controls": "none",
        "sweep_steps": sweep_steps,
        "distil.steps_per_layer": steps_per_layer,
        "replaced": ",".join(map(str, replaced)),
    }
    if plan.hours:
        budget[plan.hours] = hours
        changes |= {
            "data_quarter": {plan.hours: hours / 4},
            "data_sixteenth": {plan.hours: hours / 16},
        }
    return {name: budget | change for name, change in changes.items()}


def chosen_rows(rows: Mapping[str, dict], names: list[str]) -> dict[str, dict]:
    """The rows of these names, in their order; all of them for `all`.

    Raises:
        InputError: a name is not known, or the default row is not among them.
    """
    if names == ["all"]:
        return dict(rows)
    for name in names:
        if name not in rows:
            raise InputError(f"--rows holds {name!r}: choose 'all', or from {', '.join(rows)}")
    if DEFAULT not in names:
        raise InputError(f"--rows={','.join(names)} lacks {DEFAULT}, which rows are compared with")
    return {name: rows[name] for name in names}


if __name__ == "__main__":
    program.main(experiment)
