"""Time and memory of inference with attention, with LPA in some or all layers, and in other implementations.

Command     python -m experiments.latency --model=wav2vec2_base --replaced=0,8,12 --seconds=10,30,60,120 --peers \\
                --json=latency.json
Hardware    2 CPU cores, 16 GB
Time        about 12 minutes with 3 repeats; 16 GB of memory with --peers at 120 s
Expect      at 120 s, 8 of 12 layers replaced: 1.6 times as fast as attention like for like, 6 times as fast as
            transformers with eager attention, 2.7 with SDPA; see docs/results/latency.md

SepFormer, of 8 kHz audio, with LPA in its intra-chunk layers, beside SpeechBrain's:

    python -m experiments.latency --model=sepformer --replaced=0,8,16 --seconds=1,10,60 --peers --json=sepformer.json

Models with exits, segment by segment against the whole:

    python -m experiments.latency --model=splitformer --seconds=2,10 --json=exits.json

Batch 1, float32, random weights, noise for audio. Everything is timed in one process, in turn: an idle machine and
medians, not the smallest time, make the figures. `--json` holds all that is printed.
"""

import datetime
import functools
import importlib.metadata
import json
import math
import tempfile
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from absl import flags
from flax import nnx

from edgespeech.data.corpus import write_atomically
from edgespeech.errors import InputError
from edgespeech.evaluation.latency import (
    OURS,
    Call,
    Load,
    interleave,
    limit_threads,
    peak_memory_mb,
    ratios,
    sum_parts,
)
from edgespeech.evaluation.latency_exits import exit_calls, exit_rows, segmentation_cost
from edgespeech.evaluation.latency_models import (
    TimedModel,
    TimedWav2Vec2,
    load_model,
    prepare_forward,
    prepare_parts,
)
from edgespeech.evaluation.latency_peers import PACKAGES, PEERS, find_peers
from edgespeech.evaluation.latency_sepformer import TimedSepFormer
from edgespeech.evaluation.machine import device, versions
from edgespeech.inference.exit_criteria import ExitRule
from edgespeech.models.sepformer import SepFormerConfig
from edgespeech.models.splitformer import Splitformer, SplitformerConfig
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits
from edgespeech.types import SAMPLE_RATE
from experiments import program
from experiments.flags import int_list
from experiments.latency_tables import render, render_exits

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)

MODELS: dict[str, TimedModel] = {
    "tiny": TimedWav2Vec2(Wav2Vec2Config.tiny()),
    "small": TimedWav2Vec2(Wav2Vec2Config.small()),
    "wav2vec2_base": TimedWav2Vec2(Wav2Vec2Config.base()),
    "sepformer": TimedSepFormer(SepFormerConfig.wham()),
    "sepformer_tiny": TimedSepFormer(SepFormerConfig.tiny()),
}

# Models with exits, and what makes them.
EXIT_MODELS: dict[str, Callable[[], Any]] = {
    "splitformer": lambda: Splitformer(SplitformerConfig.splitformer("fixed"), rngs=nnx.Rngs(0)),
    "splitformer_tiny": lambda: Splitformer(SplitformerConfig.tiny(), rngs=nnx.Rngs(0)),
    "ee_baseline": lambda: Splitformer(SplitformerConfig.ee_baseline("fixed"), rngs=nnx.Rngs(0)),
    "wav2vec2_base_exits": lambda: Wav2Vec2Exits(
        Wav2Vec2(Wav2Vec2Config.base(), rngs=nnx.Rngs(0)), range(2, 13, 2)
    ),
}

flags.DEFINE_enum("model", "wav2vec2_base", sorted(MODELS | EXIT_MODELS), "What is timed.")
flags.DEFINE_enum(
    "rule", "entropy", get_args(ExitRule), "Exit rule whose scores a model with exits computes."
)
flags.DEFINE_list(
    "replaced",
    ["0", "8", "12"],
    "Numbers of layers with LPA in place of attention, in hard inference mode; 0 must be among them.",
)
flags.DEFINE_list(
    "order", [], "Layers, from 1, in the order of replacement (default: from the first on)."
)
flags.DEFINE_list("seconds", ["10", "30", "60", "120"], "Lengths of the audio.")
flags.DEFINE_bool(
    "peers", False, f"Time other implementations too, where installed: {', '.join(PEERS)}."
)
flags.DEFINE_bool("parts", True, "Time the parts of the model too; the Amdahl bound needs them.")
flags.DEFINE_integer(
    "threads", None, "Cores for all implementations (default: all that the process may use)."
)
flags.DEFINE_integer("repeats", 5, "Timed rounds over all contenders, after one of warm-up.")
flags.DEFINE_string("json", None, "File for the results.")


def experiment() -> None:
    """Check the flags, prepare everything, time it in turn, measure memory, report."""
    if FLAGS.repeats < 1:
        raise InputError(f"--repeats={FLAGS.repeats}: a median needs at least 1")
    if FLAGS.json:
        check_writable(Path(FLAGS.json))
    if FLAGS.model in EXIT_MODELS:
        time_exits()
        return
    timed = MODELS[FLAGS.model]
    replaced = read_replaced(timed)
    order = read_order(timed, replaced[-1])
    seconds = read_seconds(timed.num_frames, timed.sample_rate)
    threads = limit_threads(FLAGS.threads)
    on_cpu = jax.default_backend() == "cpu"
    if FLAGS.peers and not on_cpu:
        raise InputError(
            f"--peers run on the CPU and JAX on the {jax.default_backend()}: set JAX_PLATFORMS=cpu"
        )

    # ------------------------------------------------------------------ prepare
    random = np.random.default_rng(0)
    audio = {
        s: random.normal(0.0, 0.1, (1, round(s * timed.sample_rate))).astype(np.float32)
        for s in seconds
    }
    # A contender is named (implementation, replaced, seconds).
    calls: dict[tuple[str, int, float], Call] = {}
    compile_s: dict[tuple[str, int, float], float] = {}
    loads: dict[tuple[str, int], Load] = {}
    part_calls: dict[Hashable, functools.partial] = {}
    part_uses: dict[tuple[str, int, float], list[tuple[str, Hashable]]] = {}
    for count in replaced:
        say(f"{FLAGS.model}, {count} of {timed.num_layers} layers replaced: building, compiling")
        layers = tuple(order[:count])
        loads[OURS, count] = functools.partial(load_model, timed, layers)
        model = timed.build(layers)
        for s in seconds:
            start = time.perf_counter()
            calls[OURS, count, s] = prepare_forward(timed, model, audio[s])
            compile_s[OURS, count, s] = time.perf_counter() - start
            if FLAGS.parts:
                part_uses[OURS, count, s] = prepare_parts(timed, model, audio[s], part_calls)
    peers, notes = find_peers(timed.config, threads) if FLAGS.peers else ({}, [])
    for name, load in peers.items():
        say(f"{name}: loading")
        loads[name, 0] = load
        prepare = load()
        calls |= {(name, 0, s): prepare(audio[s]) for s in seconds}

    # ------------------------------------------------------------------ time
    say(f"timing {len(calls)} models and {len(part_calls)} parts, {FLAGS.repeats} rounds")
    timings = interleave({**calls, **part_calls}, FLAGS.repeats)

    # ------------------------------------------------------------------ memory
    rows = []
    for implementation, count, s in sorted(calls, key=lambda name: name[2]):
        name = implementation, count, s
        peak = None
        if on_cpu:
            say(f"memory of {implementation}, {count} replaced, {s:g} s")
            peak = peak_memory_mb(loads[implementation, count], audio[s])
        rows.append(
            {
                "model": FLAGS.model,
                "replaced": count,
                "seconds": s,
                "implementation": implementation,
                "median_ms": timings[name].median_ms,
                "spread_ms": timings[name].spread_ms,
                "peak_mb": peak,
                "parts_ms": sum_parts(part_uses.get(name, []), timings),
                "compile_s": compile_s.get(name),
            }
        )
    if not on_cpu:
        notes.append("peak memory is absent: it is measured on the CPU alone")

    # ------------------------------------------------------------------ report
    result = {"results": rows, "ratios": ratios(rows, list(PEERS))} | facts(threads)
    print(render(result, notes))
    write_json(result)


def time_exits() -> None:
    """A model with exits: what its segments cost, and what leaving early saves."""
    model = EXIT_MODELS[FLAGS.model]()
    frames = (model.encoder if isinstance(model, Wav2Vec2Exits) else model).config.num_frames
    seconds, threads = read_seconds(frames, SAMPLE_RATE), limit_threads(FLAGS.threads)
    random = np.random.default_rng(0)
    calls: dict[tuple[float, str, int], Call] = {}
    for s in seconds:
        say(f"{FLAGS.model}, {s:g} s: compiling")
        audio = random.normal(0.0, 0.1, (1, round(s * SAMPLE_RATE))).astype(np.float32)
        calls |= {(s, *name): call for name, call in exit_calls(model, audio, FLAGS.rule).items()}
    say(f"timing {len(calls)} contenders, {FLAGS.repeats} rounds")
    timings = interleave(calls, FLAGS.repeats)
    result: dict[str, Any] = {"rule": FLAGS.rule, "exits": [], "segmented_over_whole": {}}
    for s in seconds:
        own = {name[1:]: timing for name, timing in timings.items() if name[0] == s}
        rows = exit_rows(own)
        result["segmented_over_whole"][f"{s:g}"] = segmentation_cost(own, rows)
        result["exits"] += [
            {
                "model": FLAGS.model,
                "seconds": s,
                **row._asdict(),
                "overhead": row.overhead,
                "whole_ms": own["whole", 0].median_ms,
            }
            for row in rows
        ]
    result |= facts(threads)
    print(render_exits(result))
    write_json(result)


def facts(threads: int) -> dict[str, Any]:
    """What every result says of its run."""
    return {
        "versions": versions() | {name: package_version(name) for name in PACKAGES},
        "device": device(),
        "threads": threads,
        "date": datetime.date.today().isoformat(),
        "command": program.command_line(),
    }


def write_json(result: dict) -> None:
    """Writes the results to --json, if it is given."""
    if FLAGS.json:
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        write_atomically(Path(FLAGS.json), lambda file: file.write(text.encode()))


def say(text: str) -> None:
    """Prints unless --quiet."""
    if not FLAGS.quiet:
        print(text, flush=True)


# ------------------------------------------------------------------------------------- flags


def read_replaced(timed: TimedModel) -> tuple[int, ...]:
    """--replaced, ascending.

    Raises:
        InputError: a number is out of range, or 0 is missing.
    """
    replaced = int_list("replaced", 0, timed.num_layers)
    if 0 not in replaced:
        raise InputError(
            f"--replaced={','.join(FLAGS.replaced)} lacks 0, the model that the others are compared with: add it"
        )
    return replaced


def read_order(timed: TimedModel, count: int) -> list[int]:
    """--order as layers from 0.

    Raises:
        InputError: a layer that the model lacks or that comes twice, or fewer layers than are replaced.
    """
    layers = int_list("order", 1, timed.num_layers)
    if not FLAGS.order:
        return list(range(timed.num_layers))
    if len(layers) < len(FLAGS.order):
        raise InputError(f"--order={','.join(FLAGS.order)} names a layer twice: name each once")
    if len(layers) < count:
        raise InputError(
            f"--order names {len(layers)} layers and --replaced asks for {count}: name at least as many"
        )
    return [int(layer) - 1 for layer in FLAGS.order]


def read_seconds(num_frames: Callable[[int], int], sample_rate: int) -> list[float]:
    """--seconds, ascending, for a model that makes so many frames of audio at a rate.

    Raises:
        InputError: none, not a number, or too short for one frame.
    """
    shortest = 1
    while num_frames(shortest) < 1:
        shortest += 1
    seconds = set()
    for text in FLAGS.seconds:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"--seconds holds {text!r}: give numbers parted by commas")
        if value * sample_rate < shortest:
            raise InputError(
                f"--seconds holds {text}: one frame of {FLAGS.model} takes {shortest / sample_rate:g} s or more"
            )
        seconds.add(value)
    if not seconds:
        raise InputError("--seconds is empty: give at least one length")
    return sorted(seconds)


def check_writable(path: Path) -> None:
    """Finds out before the measurement whether the results can be stored.

    Raises:
        InputError: they cannot.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(
            f"--json={path} cannot be written ({error.strerror}): name another file"
        ) from error


def package_version(name: str) -> str:
    """Version of a peer's package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    program.main(experiment)
