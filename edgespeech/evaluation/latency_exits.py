"""What leaving early saves: the whole model as one program, segment by segment, and up to each exit.

    segmented / whole                                       what the cuts cost; all exits are passed, none is taken
    exit_m / (front_end + sum_{i<=m} (block_i + head_i))    what leaving costs beyond the work that is done

The parts are compiled and timed on their own, in the same run.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from edgespeech.evaluation.latency import Call, Timing
from edgespeech.evaluation.latency_models import apply, compile_ahead
from edgespeech.inference.early_exit import EarlyExit, SingleProgramEarlyExit
from edgespeech.inference.exit_criteria import ExitRule, greedy_tokens
from edgespeech.inference.exit_policy import ExitPolicy
from edgespeech.types import Array, Audio, Lengths

WHOLE, SEGMENTED, SINGLE, FRONT_END = "whole", "segmented", "single program", "front end"


class ExitRow(NamedTuple):
    """Times of one exit at one length of audio.

    Attributes:
        exit: counted from 1.
        median_ms: segment by segment up to it.
        single_ms: the same as one program.
        parts_ms: front end, blocks and heads up to it, each timed on its own.
    """

    exit: int
    median_ms: float
    single_ms: float
    parts_ms: float

    @property
    def overhead(self) -> float:
        """Time over that of the parts."""
        return self.median_ms / self.parts_ms


def exit_calls(model: Any, audio: np.ndarray, rule: ExitRule) -> dict[tuple[str, int], Call]:
    """Contenders by (name, exit): what `interleave` times.

    Args:
        model: with exits, see `ExitModel`; its call returns an `ExitOutput`.
        audio: `[1 t]`.
        rule: whose scores are computed at every exit.
    """
    arrays = jnp.asarray(audio), jnp.asarray([audio.shape[1]])
    never = ExitPolicy(rule, -np.inf if rule == "entropy" else np.inf)
    segmented, single = EarlyExit(model, never), SingleProgramEarlyExit(model, never)
    calls: dict[tuple[str, int], Call] = {}

    def add(name: str, exit: int, function: Callable[..., Any], module: Any, *inputs: Array) -> Any:
        executable, leaves = compile_ahead(function, module, *inputs)
        calls[name, exit] = functools.partial(executable, leaves, *inputs)
        return calls[name, exit]()

    add(WHOLE, 0, _whole, model, *arrays)
    x, lengths = add(FRONT_END, 0, _embed, model, *arrays)
    for exit, (block, head) in enumerate(zip(model.blocks, model.heads, strict=True), 1):
        x = add("block", exit, apply, block, x, lengths)
        add("head", exit, apply, head, x, lengths)
        calls[SEGMENTED, exit] = functools.partial(segmented, *arrays, exit)
        calls[SINGLE, exit] = functools.partial(single, *arrays, exit)
    return calls


def _whole(model: Any, audio: Audio, lengths: Lengths) -> list[Array]:
    """Greedy transcripts of all exits: what is passed on the way through the segments."""
    output = model(audio, lengths)
    return [greedy_tokens(logits, output.lengths) for logits in output.exit_logits]


def _embed(model: Any, audio: Audio, lengths: Lengths) -> Any:
    return model.embed(audio, lengths)


def exit_rows(timings: Mapping[tuple[str, int], Timing]) -> list[ExitRow]:
    """The rows of all exits, from timings of `exit_calls`."""
    rows: list[ExitRow] = []
    parts = timings[FRONT_END, 0].median_ms
    for exit in range(1, 1 + max(exit for _, exit in timings)):
        parts += timings["block", exit].median_ms + timings["head", exit].median_ms
        segmented, single = (timings[name, exit].median_ms for name in (SEGMENTED, SINGLE))
        rows.append(ExitRow(exit, segmented, single, parts))
    return rows


def segmentation_cost(timings: Mapping[tuple[str, int], Timing], rows: Sequence[ExitRow]) -> float:
    """Full depth segment by segment over the whole model as one program."""
    return rows[-1].median_ms / timings[WHOLE, 0].median_ms
