"""Self-attention in the layout (B, C, 1, S) against [b n d], through XLA and through LiteRT's XNNPACK.

Command     python -m experiments.layouts --frames=100,500,1500 --threads=1,2 --json=layouts.json
Hardware    2 CPU cores; needs the extra `litert`
Time        some minutes, most of it compilation; an idle machine makes the figures
Expect      a table: medians, interquartile ranges, and the ratios of the layouts in each runtime and of the runtimes
            in each layout. It says what the layout costs or gains on a CPU; the neural accelerators that it was made
            for are not measured here

One layer with random weights, batch 1, float32, all frames valid; both layouts have the same parameters, and the
program ends with status 2 if their outputs differ. For each number of threads there is a process, bound to as many
cores, in which all contenders run in turn.
"""

import datetime
import importlib.metadata
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from absl import flags

from edgespeech.errors import InputError
from edgespeech.evaluation.latency_layouts import (
    CHANNELS_FIRST,
    Layouts,
    layout_rows,
    measure_layouts,
)
from edgespeech.evaluation.machine import device, versions
from experiments import program
from experiments.flags import int_list
from experiments.latency_tables import table

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)

PACKAGES = ("ai-edge-litert", "litert-converter")
# Largest difference of outputs that passes for float rounding; they are of the order of 0.1.
TOLERANCE = 1e-4

flags.DEFINE_integer("width", 768, "Model width d.", lower_bound=1)
flags.DEFINE_integer("heads", 12, "Attention heads.", lower_bound=1)
flags.DEFINE_list("frames", ["100", "500", "1500"], "Lengths n.")
flags.DEFINE_list(
    "chunks", ["0", "256"], "Queries at a time of the (B, C, 1, S) graph; 0: all at once."
)
flags.DEFINE_list("threads", ["1", "2"], "Numbers of cores and threads.")
flags.DEFINE_integer("repeats", 15, "Timed rounds over all contenders.", lower_bound=1)
flags.DEFINE_string("json", None, "Write the results here as well.")


def experiment() -> None:
    """Check the flags, time everything, report."""
    layouts = Layouts(
        FLAGS.width, FLAGS.heads, int_list("frames", 1, 100_000), int_list("chunks", 0, 100_000)
    )
    threads = int_list("threads", 1, 1024)
    if not (layouts.frames and layouts.chunks and threads):
        raise InputError("--frames, --chunks and --threads need at least one number each")
    if FLAGS.json and not Path(FLAGS.json).parent.is_dir():
        raise InputError(f"--json={FLAGS.json}: there is no folder {Path(FLAGS.json).parent}")
    rows = []
    for number in threads:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            measured = executor.submit(measure_layouts, layouts, number, FLAGS.repeats).result()
        rows += layout_rows(number, measured)
    result = {
        "results": rows,
        "settings": {name: FLAGS[name].value for name in ("width", "heads", "repeats")},
        "versions": versions() | {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": device(),
        "date": datetime.date.today().isoformat(),
        "command": program.command_line(),
    }
    print(render(result))
    if FLAGS.json:
        program.write_json(FLAGS.json, result)
    worst = max(row["difference"] for row in rows)
    if worst > TOLERANCE:
        raise InputError(f"the layouts differ by {worst:.2g}: the times compare nothing")


def render(result: dict[str, Any]) -> str:
    """The table of the terminal."""
    settings, found = result["settings"], result["versions"]
    title = (
        f"Self-attention, width {settings['width']}, {settings['heads']} heads: batch 1, float32, "
        f"{result['device']['cpu']}, jax {found['jax']}, LiteRT {found['ai-edge-litert']}, {result['date']}\n"
        "over [b n d]: time over that of the standard layout in the same runtime; over XLA: in the same layout"
    )
    header = ("threads", "frames", "runtime", "layout", "median ms", "IQR ms", "over [b n d]")
    rows = [
        [
            *(row["threads"], row["frames"], row["runtime"], layout_name(row)),
            *(f"{row[key]:.2f}" for key in ("median_ms", "spread_ms", "over_standard", "over_xla")),
        ]
        for row in result["results"]
    ]
    return table(title, (*header, "over XLA"), rows)


def layout_name(row: dict[str, Any]) -> str:
    """As it stands in the table."""
    if row["layout"] != CHANNELS_FIRST:
        return "[b n d]"
    return f"(B, C, 1, S), {row['chunk'] or 'all'} queries"


if __name__ == "__main__":
    program.main(experiment)
