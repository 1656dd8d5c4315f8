"""Timing of models that are left early."""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
from absl import flags
from flax import nnx

from edgespeech.evaluation.latency import Call, interleave, limit_threads
from edgespeech.evaluation.latency_exits import (
    branch_rows,
    exit_calls,
    exit_rows,
    segmentation_cost,
)
from edgespeech.inference.exit_budget import exit_compute
from edgespeech.inference.exit_criteria import ExitRule
from edgespeech.models.splitformer import Splitformer, SplitformerConfig
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits
from edgespeech.types import SAMPLE_RATE
from experiments.latency_run import facts, read_seconds, say, write_json
from experiments.latency_tables import render_exits

FLAGS = flags.FLAGS
# Models with exits, and what makes them.
EXIT_MODELS: dict[str, Callable[[], Any]] = {
    "splitformer": lambda: Splitformer(SplitformerConfig.splitformer("fixed"), rngs=nnx.Rngs(0)),
    "splitformer_tiny": lambda: Splitformer(SplitformerConfig.tiny(), rngs=nnx.Rngs(0)),
    "ee_baseline": lambda: Splitformer(SplitformerConfig.ee_baseline("fixed"), rngs=nnx.Rngs(0)),
    "wav2vec2_base_exits": lambda: Wav2Vec2Exits(
        Wav2Vec2(Wav2Vec2Config.base(), rngs=nnx.Rngs(0)), range(2, 13, 2)
    ),
}

flags.DEFINE_enum(
    "rule", "entropy", get_args(ExitRule), "Exit rule whose scores a model with exits computes."
)


def time_exits() -> None:
    """A model with exits: what its segments cost, and what leaving early saves."""
    model = EXIT_MODELS[FLAGS.model]()
    seconds = read_seconds(model.config.num_frames, SAMPLE_RATE)
    threads = limit_threads(FLAGS.threads)
    random = np.random.default_rng(0)
    calls: dict[tuple[float, str, int], Call] = {}
    for s in seconds:
        say(f"{FLAGS.model}, {s:g} s: compiling")
        audio = random.normal(0.0, 0.1, (1, round(s * SAMPLE_RATE))).astype(np.float32)
        calls |= {(s, *name): call for name, call in exit_calls(model, audio, FLAGS.rule).items()}
    say(f"timing {len(calls)} contenders, {FLAGS.repeats} rounds")
    timings = interleave(calls, FLAGS.repeats)
    result: dict[str, Any] = {"rule": FLAGS.rule, "exits": [], "branches": [], "full_depth": {}}
    for s in seconds:
        own = {name[1:]: timing for name, timing in timings.items() if name[0] == s}
        rows = exit_rows(own)
        result["full_depth"][f"{s:g}"] = segmentation_cost(own, rows)
        macs = exit_compute(model, s)
        # Leaving at an exit, the next segment has been computed for nothing.
        wasted = [*np.diff(macs) / macs[-1], 0.0]
        result["branches"] += [
            {"seconds": s, **row._asdict(), "hidden": row.hidden} for row in branch_rows(own)
        ]
        result["exits"] += [
            {
                "model": FLAGS.model,
                "seconds": s,
                **row._asdict(),
                "overhead": row.overhead,
                "lookahead_waste": float(wasted[row.exit - 1]),
                "whole_ms": own["whole", 0].median_ms,
            }
            for row in rows
        ]
    result |= facts(threads)
    print(render_exits(result))
    write_json(result)
