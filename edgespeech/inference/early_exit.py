"""Early exits that save compute: one compiled program a segment, or one program for everything at batch 1.

A segment is a block, its head and the exit rule. `lax.cond` under `vmap` runs both sides; here the next segment is
either started or not.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.inference.exit_criteria import (
    exit_score,
    exits_agreeing,
    greedy_tokens,
)
from edgespeech.inference.exit_policy import CALIBRATED, ExitPolicy, PolicyRule, passes
from edgespeech.inference.exit_predictor import FEATURES, exit_features, leave_probability
from edgespeech.ops.ctc import BLANK
from edgespeech.types import Array, Audio, Bool, Float, Frames, Int, Lengths

FRAME_MULTIPLE = 32  # regrouped batches are cut to a multiple of it


class ExitModel(Protocol):
    """A model with exits, such as `Splitformer`."""

    @property
    def blocks(self) -> Sequence[Any]:
        """One an exit, `(x [b n d], lengths) -> [b n d]`."""
        ...

    @property
    def heads(self) -> Sequence[Any]:
        """One an exit, `(x, lengths) -> logits [b n v]`."""
        ...

    def embed(self, audio: Audio, audio_lengths: Lengths) -> tuple[Frames, Lengths]:
        """Audio to the input of the first block and its lengths."""
        ...


class ExitResult(NamedTuple):
    """Greedy transcripts, and where each utterance left.

    Attributes:
        tokens: labels of each utterance, blanks and repeats removed.
        exits: `[b]`, the exit taken, counted from 1.
        scores: `[b]`, the rule's score there.
    """

    tokens: list[np.ndarray]
    exits: np.ndarray
    scores: np.ndarray


class _Progress(NamedTuple):
    """What goes from segment to segment."""

    x: Frames
    lengths: Lengths
    tokens: Int[Array, "b n"]
    agreeing: Int[Array, "b"]


class _Decision(NamedTuple):
    """What a segment says about its utterances."""

    score: Float[Array, "b"]
    leaves: Bool[Array, "b"]


# What a segment gives.
_Step: TypeAlias = tuple[_Progress, _Decision]


class _Limit(NamedTuple):
    """What a segment's score is made with and compared to.

    Attributes:
        threshold: of the policy.
        weights, bias: the regression of the rule `calibrated` at this exit; zeros for the other rules.
    """

    threshold: Float[Array, ""]
    weights: Float[Array, "f"]
    bias: Float[Array, ""]


def _limits(policy: ExitPolicy, num_exits: int) -> list[_Limit]:
    """One an exit; nobody goes on from the last one, whose regression is that of certainty."""
    weights, bias = np.zeros((num_exits, len(FEATURES))), np.zeros(num_exits)
    if policy.predictor is not None:
        if len(policy.predictor.bias) != num_exits - 1:
            raise InputError(
                f"the predictor is for {len(policy.predictor.bias) + 1} exits and the model has {num_exits}: "
                "fit one for this model"
            )
        weights[:-1], bias[:-1], bias[-1] = *policy.predictor, np.inf
    threshold = jnp.float32(policy.threshold)
    return [
        _Limit(threshold, jnp.asarray(w, jnp.float32), jnp.float32(b))
        for w, b in zip(weights, bias, strict=True)
    ]


def _start(model: ExitModel, audio: Audio, audio_lengths: Lengths) -> _Progress:
    x, lengths = model.embed(audio, audio_lengths)
    return _Progress(
        x,
        lengths,
        jnp.full(x.shape[:2], BLANK, jnp.int32),
        jnp.zeros(len(x), jnp.int32),
    )


def _segment(
    block, head, rule: PolicyRule, n_best: int, limit: _Limit, progress: _Progress
) -> _Step:
    before, lengths = progress.x, progress.lengths
    after = block(before, lengths)
    logits = head(after, lengths)
    tokens = greedy_tokens(logits, lengths)
    agreeing = exits_agreeing(tokens, progress.tokens, progress.agreeing)
    if rule == CALIBRATED:
        features = exit_features(before, after, logits, lengths, tokens, progress.tokens, agreeing)
        score = leave_probability(limit.weights, limit.bias, features)
    else:
        score = exit_score(rule, before, after, logits, lengths, agreeing, n_best)
    decision = _Decision(score, passes(rule, score, limit.threshold))
    return _Progress(after, lengths, tokens, agreeing), decision


class EarlyExit:
    """Runs a batch segment by segment; the utterances that go on are regrouped into a smaller batch.

    After each segment one boolean vector is read back. The survivors are gathered into the next power of two of rows
    and the next multiple of 32 frames, so that few shapes are compiled; exact padding makes this the same for each
    utterance as being alone. Segments of equal structure share one compilation.

    With `lookahead=1` the next segment is enqueued before that vector is read, so that the device does not wait for the
    host between segments. Exits and transcripts are the same. What is wasted is one segment at most: an utterance that
    leaves at an exit has the next segment computed for nothing; it does not wait for it, the next utterance does. One
    that takes the last exit allowed wastes nothing. It is for utterances that mostly go on.

    Args:
        model: with exits; its variables are those of now.
        policy: when to leave.
        lookahead: segments started before it is known whether anyone needs them, 0 or 1.

    Raises:
        InputError: the policy's predictor is for another number of exits, or lookahead is neither 0 nor 1.
    """

    def __init__(self, model: ExitModel, policy: ExitPolicy, lookahead: int = 0):
        if lookahead not in (0, 1):
            raise InputError(f"lookahead is {lookahead}: choose 0 or 1 segment")
        self.policy = policy
        self.lookahead = lookahead
        self.num_exits = len(model.blocks)
        self._limits = _limits(policy, self.num_exits)
        merge, self._leaves = _take_apart(model)
        self._embed = jax.jit(lambda leaves, audio, lengths: _start(merge(leaves), audio, lengths))
        self._segments = []
        for block, head in zip(model.blocks, model.heads, strict=True):
            graphdef, state = nnx.split((block, head))
            leaves, structure = jax.tree.flatten(state)
            program = _segment_program(graphdef, structure, policy.rule, policy.n_best)
            self._segments.append((program, leaves))

    def __call__(
        self, audio: Audio, audio_lengths: Lengths, max_exit: int | None = None
    ) -> ExitResult:
        """Transcribes a batch.

        Args:
            audio: `[b t]`, float32 in [-1, 1], 16 kHz.
            audio_lengths: `[b]`, valid samples.
            max_exit: the deepest exit allowed, counted from 1, from `exit_for_budget`; None: the last.

        Raises:
            InputError: max_exit is not an exit, or the batch is too short for a frame.
        """
        last = _checked_exit(max_exit, self.num_exits)
        progress = self._embed(self._leaves, audio, audio_lengths)
        b = len(progress.x)
        step = self._run(1, progress)
        rows = np.arange(b)  # the utterance in each row; -1: filler, or one that has left
        finished: list[tuple[int, np.ndarray, Array, Array]] = []
        lengths = None
        for exit in range(1, last + 1):
            # Enqueued, and perhaps never waited for.
            ahead = self._run(exit + 1, step[0]) if self.lookahead and exit < last else None
            progress, decision = step
            leaves = np.ones(len(rows), bool) if exit == last else np.asarray(decision.leaves)
            finished.append((exit, np.where(leaves, rows, -1), progress.tokens, decision.score))
            rows = np.where(leaves, -1, rows)
            survivors = np.flatnonzero(rows >= 0)
            if not len(survivors):
                break
            if lengths is None:  # read once, when the device has got here in any case
                lengths = np.asarray(progress.lengths)
            rows, step = _regroup(rows, survivors, lengths, ahead or step)
            if ahead is None:
                step = self._run(exit + 1, step[0])
        return _collect(finished, b)

    def _run(self, exit: int, progress: _Progress) -> _Step:
        program, weights = self._segments[exit - 1]
        return program(weights, self._limits[exit - 1], progress)


# Segments of equal structure share a program. It is looked up once: hashing a structure takes longer than a start.
@functools.lru_cache(maxsize=64)
def _segment_program(graphdef, structure, rule: PolicyRule, n_best: int):
    @jax.jit
    def run(leaves, limit, progress):
        block, head = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
        return _segment(block, head, rule, n_best, limit, progress)

    return run


def _take_apart(model: Any) -> tuple[Callable[[list[Array]], Any], list[Array]]:
    """A function from the model's arrays to the model, and the arrays: a flat list, which is quick to hand over."""
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    return lambda leaves: nnx.merge(graphdef, jax.tree.unflatten(structure, leaves)), leaves


@functools.partial(jax.jit, static_argnums=2)
def _gather(step: _Step, index: Int[Array, "k"], frames: int, real: Bool[Array, "k"]) -> _Step:
    (x, lengths, tokens, agreeing), decision = jax.tree.map(
        lambda leaf: jnp.take(leaf, index, axis=0), step
    )
    lengths = jnp.where(real, lengths, 0)
    return _Progress(x[:, :frames], lengths, tokens[:, :frames], agreeing), decision


def _regroup(
    rows: np.ndarray, survivors: np.ndarray, lengths: np.ndarray, step: _Step
) -> tuple[np.ndarray, _Step]:
    """The survivors in the next bucket; the same batch where that is no smaller."""
    b, n = step[0].x.shape[:2]
    size = min(b, 1 << (len(survivors) - 1).bit_length())
    longest = int(lengths[rows[survivors]].max())
    frames = min(n, max(1, -(-longest // FRAME_MULTIPLE)) * FRAME_MULTIPLE)
    if (size, frames) == (b, n):
        return rows, step
    index = np.resize(survivors, size)
    real = np.arange(size) < len(survivors)
    return np.where(real, rows[index], -1), _gather(step, index, frames, real)


def _collect(finished, b: int) -> ExitResult:
    tokens: list[np.ndarray] = [np.zeros(0, np.int32)] * b
    exits, scores = np.zeros(b, np.int32), np.zeros(b, np.float32)
    for exit, rows, exit_tokens, exit_scores in finished:
        left = np.flatnonzero(rows >= 0)
        if not len(left):
            continue
        exit_tokens, exit_scores = np.asarray(exit_tokens), np.asarray(exit_scores)
        for row in left:
            utterance = rows[row]
            tokens[utterance] = exit_tokens[row][exit_tokens[row] != BLANK]
            exits[utterance], scores[utterance] = exit, exit_scores[row]
    return ExitResult(tokens, exits, scores)


class SingleProgramEarlyExit:
    """The whole of it as one program for batch 1: `lax.while_loop` around a `lax.switch` over the segments.

    Nothing is read back between segments, and the program can be exported; threshold and deepest exit are inputs.

    Args:
        model: with exits; its variables are those of now.
        policy: when to leave.

    Raises:
        InputError: the policy's predictor is for another number of exits.
    """

    def __init__(self, model: ExitModel, policy: ExitPolicy):
        self.policy = policy
        self.num_exits = len(model.blocks)
        self._limits = _limits(policy, self.num_exits)
        merge, self._leaves = _take_apart(model)

        @jax.jit
        def run(leaves, limits, max_exit, audio, audio_lengths):
            return _run_loop(merge(leaves), policy, limits, max_exit, audio, audio_lengths)

        self._run = run

    def __call__(
        self, audio: Audio, audio_lengths: Lengths, max_exit: int | None = None
    ) -> ExitResult:
        """Transcribes one utterance; arguments and result as of `EarlyExit`.

        Raises:
            InputError: the batch is not 1, max_exit is not an exit, or the audio is too short for a frame.
        """
        last = _checked_exit(max_exit, self.num_exits)
        if len(audio) != 1:
            raise InputError(
                f"a batch of {len(audio)}: the single program takes 1 utterance; use EarlyExit for batches"
            )
        exit, tokens, score = self._run(self._leaves, self._limits, last, audio, audio_lengths)
        tokens = np.asarray(tokens[0])
        return ExitResult([tokens[tokens != BLANK]], np.asarray(exit)[None], np.asarray(score))


def _run_loop(model: ExitModel, policy: ExitPolicy, limits, max_exit, audio, audio_lengths):
    segments = [
        functools.partial(_segment, block, head, policy.rule, policy.n_best, limit)
        for block, head, limit in zip(model.blocks, model.heads, limits, strict=True)
    ]

    def goes_on(carry):
        exit, _, decision = carry
        return (exit < max_exit) & ~decision.leaves[0]

    def next_segment(carry):
        exit, progress, _ = carry
        progress, decision = jax.lax.switch(exit, segments, progress)
        return exit + 1, progress, decision

    nothing = _Decision(jnp.zeros(1), jnp.zeros(1, bool))
    start = (jnp.int32(0), _start(model, audio, audio_lengths), nothing)
    exit, progress, decision = jax.lax.while_loop(goes_on, next_segment, start)
    return exit, progress.tokens, decision.score


def _checked_exit(max_exit: int | None, num_exits: int) -> int:
    if max_exit is None:
        return num_exits
    if not 1 <= max_exit <= num_exits:
        raise InputError(f"max_exit is {max_exit}: choose 1 to {num_exits}")
    return max_exit
