"""What leaving early saves: the whole model as one program, segment by segment, and up to each exit.

    segmented / whole                                       what the cuts cost; all exits are passed, none is taken
    exit_m / (front_end + sum_{i<=m} (block_i + head_i))    what leaving costs beyond the work that is done
    (layers + branch - block) / branch                      how much of a branch's time is hidden beside its layers

The parts are compiled and timed on their own, in the same run.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from edgespeech.evaluation.latency import Call, Timing
from edgespeech.evaluation.latency_models import apply, compile_ahead
from edgespeech.inference.early_exit import EarlyExit, SingleProgramEarlyExit
from edgespeech.inference.exit_criteria import ExitRule, all_exit_scores, greedy_tokens
from edgespeech.inference.exit_policy import ExitPolicy
from edgespeech.nn.branch_execution import BranchExecution
from edgespeech.nn.parallel_branch import half_lengths
from edgespeech.types import Array, Audio, Frames, Lengths

WHOLE, SCORED, FRONT_END = "whole", "whole with scores", "front end"
SEGMENTED, LOOKAHEAD, SINGLE = "segmented", "looking ahead", "single program"
LAYERS, BRANCH = "layers", "branch"  # of a block


class ExitRow(NamedTuple):
    """Times of one exit at one length of audio.

    Attributes:
        exit: counted from 1.
        median_ms: segment by segment up to it.
        lookahead_ms: the same with the next segment started before it is known whether it is needed.
        single_ms: the same as one program.
        parts_ms: front end, blocks and heads up to it, each timed on its own.
    """

    exit: int
    median_ms: float
    lookahead_ms: float
    single_ms: float
    parts_ms: float

    @property
    def overhead(self) -> float:
        """Time over that of the parts."""
        return self.median_ms / self.parts_ms


class BranchRow(NamedTuple):
    """Times of one block with a branch at one length of audio.

    Attributes:
        exit: of the block, counted from 1.
        layers_ms: the block without its branch.
        branch_ms: the branch alone.
        sequential_ms, batched_ms, sharded_ms: both, see `run_with_branch`; None: the machine has one device.
    """

    exit: int
    layers_ms: float
    branch_ms: float
    sequential_ms: float
    batched_ms: float
    sharded_ms: float | None

    @property
    def hidden(self) -> float:
        """Share of the branch's time that one program runs beside the layers; below 0: it is slower than both parts."""
        return (self.layers_ms + self.branch_ms - self.sequential_ms) / self.branch_ms


def exit_calls(model: Any, audio: np.ndarray, rule: ExitRule) -> dict[tuple[str, int], Call]:
    """Contenders by (name, exit): what `interleave` times.

    Args:
        model: with exits, see `ExitModel`; its call returns an `ExitOutput`.
        audio: `[1 t]`.
        rule: whose scores are computed at every exit.
    """
    arrays = jnp.asarray(audio), jnp.asarray([audio.shape[1]])
    never = ExitPolicy(rule, -np.inf if rule == "entropy" else np.inf)
    segmented, ahead = EarlyExit(model, never), EarlyExit(model, never, lookahead=1)
    single = SingleProgramEarlyExit(model, never)
    calls: dict[tuple[str, int], Call] = {}

    def add(name: str, exit: int, function: Callable[..., Any], module: Any, *inputs: Array) -> Any:
        executable, leaves = compile_ahead(function, module, *inputs)
        calls[name, exit] = functools.partial(executable, leaves, *inputs)
        return calls[name, exit]()

    add(WHOLE, 0, _whole, model, *arrays)
    add(SCORED, 0, functools.partial(_scored, rule), model, *arrays)
    x, lengths = add(FRONT_END, 0, _embed, model, *arrays)
    for exit, (block, head) in enumerate(zip(model.blocks, model.heads, strict=True), 1):
        if getattr(block, "branch", None) is not None:
            add(LAYERS, exit, _run_layers, block, x, lengths)
            add(BRANCH, exit, _run_branch, block.branch, x, lengths)
            for execution, call in branch_calls(block, x, lengths).items():
                calls[execution, exit] = call
        x = add("block", exit, apply, block, x, lengths)
        add("head", exit, apply, head, x, lengths)
        calls[SEGMENTED, exit] = functools.partial(segmented, *arrays, exit)
        calls[LOOKAHEAD, exit] = functools.partial(ahead, *arrays, exit)
        calls[SINGLE, exit] = functools.partial(single, *arrays, exit)
    return calls


def branch_calls(block: Any, x: Frames, lengths: Lengths) -> dict[BranchExecution, Call]:
    """A block with a branch, run in every way that this machine can; the inputs lie where they are needed."""
    calls: dict[BranchExecution, Call] = {}
    for execution in get_args(BranchExecution)[1:]:
        inputs, copy = (x, lengths), nnx.clone(block)
        if execution == "sharded":
            if len(jax.devices()) < 2:
                continue
            # As many copies as devices, made once: a call would make them anew every time.
            mesh = jax.make_mesh((2,), ("any",), devices=jax.devices()[:2])
            everywhere = NamedSharding(mesh, PartitionSpec())
            graphdef, state = nnx.split(block)
            inputs = jax.device_put(inputs, everywhere)
            copy = nnx.merge(graphdef, jax.device_put(state, everywhere))
        copy.execution = execution
        executable, leaves = compile_ahead(apply, copy, *inputs)
        calls[execution] = functools.partial(executable, leaves, *inputs)
    return calls


def _whole(model: Any, audio: Audio, lengths: Lengths) -> list[Array]:
    """Greedy transcripts of all exits: what is passed on the way through the segments."""
    output = model(audio, lengths)
    return [greedy_tokens(logits, output.lengths) for logits in output.exit_logits]


def _scored(rule: ExitRule, model: Any, audio: Audio, lengths: Lengths) -> Any:
    """Transcripts and scores of all exits: all that the segments compute."""
    output = model(audio, lengths)
    passed = output.embedded, output.hidden, output.exit_logits, output.lengths
    return all_exit_scores(rule, *passed, n_best=ExitPolicy(rule, 0.0).n_best)


def _embed(model: Any, audio: Audio, lengths: Lengths) -> Any:
    return model.embed(audio, lengths)


def _run_layers(block: Any, x: Frames, lengths: Lengths) -> Frames:
    for layer in block.layers:
        x = layer(x, lengths)
    return x


def _run_branch(branch: Any, x: Frames, lengths: Lengths) -> Frames:
    return branch.layer(branch.downsampled(x, lengths), half_lengths(lengths))


def exit_rows(timings: Mapping[tuple[str, int], Timing]) -> list[ExitRow]:
    """The rows of all exits, from timings of `exit_calls`."""
    rows: list[ExitRow] = []
    parts = timings[FRONT_END, 0].median_ms
    for exit in range(1, 1 + max(exit for _, exit in timings)):
        parts += timings["block", exit].median_ms + timings["head", exit].median_ms
        segmented, ahead, single = (
            timings[name, exit].median_ms for name in (SEGMENTED, LOOKAHEAD, SINGLE)
        )
        rows.append(ExitRow(exit, segmented, ahead, single, parts))
    return rows


def branch_rows(timings: Mapping[tuple[str, int], Timing]) -> list[BranchRow]:
    """The rows of all blocks with a branch, from timings of `exit_calls`."""
    rows: list[BranchRow] = []
    for exit in sorted(exit for name, exit in timings if name == BRANCH):
        layers, branch, both, batched = (
            timings[name, exit].median_ms for name in (LAYERS, BRANCH, "block", "batched")
        )
        sharded = timings.get(("sharded", exit))
        sharded_ms = None if sharded is None else sharded.median_ms
        rows.append(BranchRow(exit, layers, branch, both, batched, sharded_ms))
    return rows


def segmentation_cost(
    timings: Mapping[tuple[str, int], Timing], rows: Sequence[ExitRow]
) -> dict[str, float]:
    """Full depth segment by segment over the whole model as one program, without and with the rule's scores in it."""
    full = {"segmented": rows[-1].median_ms, "lookahead": rows[-1].lookahead_ms}
    return {
        f"{name}_over_{one}": ms / timings[whole, 0].median_ms
        for name, ms in full.items()
        for one, whole in (("whole", WHOLE), ("scored", SCORED))
    }
