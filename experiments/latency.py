"""Time and memory of inference with attention, with LPA in some or all layers, and in other implementations.

Command     python -m experiments.latency --model=wav2vec2_base --replaced=0,8,12 --seconds=10,30,60,120 --peers \\
                --json=latency.json
Hardware    2 CPU cores, 16 GB
Time        20 minutes with --peers and 6 without; 16 GB of memory with --peers at 120 s
Expect      at 120 s, 8 of 12 layers replaced: 1.5 times as fast as attention like for like, 8 times as fast as
            transformers with eager attention, 2.8 with SDPA; see docs/results/latency.md

SepFormer, of 8 kHz audio, with LPA in its intra-chunk layers, beside SpeechBrain's:

    python -m experiments.latency --model=sepformer --replaced=0,8,16 --seconds=1,10,60 --peers --json=sepformer.json

Models with exits, segment by segment against the whole, and branches beside their layers (on a CPU, with
XLA_FLAGS=--xla_force_host_platform_device_count=2 on two devices, too):

    python -m experiments.latency --model=splitformer --seconds=2,10 --json=exits.json

A streaming model on one core, chunk by chunk, attention and LPA:

    python -m experiments.latency --model=edge_watch --streaming --threads=1 --json=streaming.json

Batch 1, float32, random weights, noise for audio. Everything is timed in one process, in turn: an idle machine and
medians, not the smallest time, make the figures. `--json` holds all that is printed.
"""

import functools
import time
from collections.abc import Hashable
from pathlib import Path

import jax
import numpy as np
from absl import flags

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
from edgespeech.evaluation.latency_models import (
    TimedModel,
    TimedWav2Vec2,
    load_model,
    prepare_forward,
    prepare_parts,
)
from edgespeech.evaluation.latency_peers import PEERS, find_peers
from edgespeech.evaluation.latency_sepformer import TimedSepFormer
from edgespeech.models.sepformer import SepFormerConfig
from edgespeech.models.wav2vec2 import Wav2Vec2Config
from experiments import latency_exits, latency_run, latency_streams, program
from experiments.flags import int_list
from experiments.latency_exits import EXIT_MODELS, time_exits
from experiments.latency_run import check_writable, facts, read_seconds, say, write_json
from experiments.latency_streams import STREAM_MODELS, time_streams
from experiments.latency_tables import render

FLAGS = flags.FLAGS
for module in (latency_run, latency_exits, latency_streams):
    flags.adopt_module_key_flags(module)

MODELS: dict[str, TimedModel] = {
    "tiny": TimedWav2Vec2(Wav2Vec2Config.tiny()),
    "small": TimedWav2Vec2(Wav2Vec2Config.small()),
    "wav2vec2_base": TimedWav2Vec2(Wav2Vec2Config.base()),
    "sepformer": TimedSepFormer(SepFormerConfig.wham()),
    "sepformer_tiny": TimedSepFormer(SepFormerConfig.tiny()),
}

flags.DEFINE_enum(
    "model", "wav2vec2_base", sorted(MODELS | EXIT_MODELS | STREAM_MODELS), "What is timed."
)
flags.DEFINE_list(
    "replaced",
    ["0", "8", "12"],
    "Numbers of layers with LPA in place of attention, in hard inference mode; 0 must be among them.",
)
flags.DEFINE_list(
    "order", [], "Layers, from 1, in the order of replacement (default: from the first on)."
)
flags.DEFINE_bool(
    "peers", False, f"Time other implementations too, where installed: {', '.join(PEERS)}."
)
flags.DEFINE_bool("parts", True, "Time the parts of the model too; the Amdahl bound needs them.")


def experiment() -> None:
    """Check the flags, prepare everything, time it in turn, measure memory, report."""
    if FLAGS.repeats < 1:
        raise InputError(f"--repeats={FLAGS.repeats}: a median needs at least 1")
    if FLAGS.json:
        check_writable(Path(FLAGS.json))
    if FLAGS.streaming != (FLAGS.model in STREAM_MODELS):
        raise InputError(
            f"--streaming goes with {', '.join(STREAM_MODELS)}, and these with it: --model is {FLAGS.model}"
        )
    if FLAGS.streaming:
        time_streams()
        return
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
    same = [name for name, peer in PEERS.items() if isinstance(timed.config, peer.family)]
    result = {"results": rows, "ratios": ratios(rows, same)} | facts(threads)
    print(render(result, notes))
    write_json(result)


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


if __name__ == "__main__":
    program.main(experiment)
