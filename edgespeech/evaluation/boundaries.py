"""Where tokens and words begin, by forced alignment with a CTC model, and how well the edges of pulses agree with it.

Times are in seconds from the start of the utterance; edges are between frames, edge e before frame e. Ours throughout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgespeech.errors import InputError
from edgespeech.ops.ctc import BLANK

DRAWS = 100  # of random edges
_ROUNDING = (
    1e-9  # seconds: a distance of the tolerance itself counts, however its times were rounded
)


def align(log_probs: np.ndarray, target: Sequence[int] | np.ndarray) -> np.ndarray:
    """The most likely CTC alignment of a target: the index in it of every frame's token, -1 for the blank; int `[n]`.

        argmax_pi sum_i log p_i(pi_i)   over the paths pi that collapse to the target

    by the Viterbi recursion over the states blank, y_1, blank, ..., y_u, blank, in float64. A state follows itself, its
    neighbour, and the token before where that is another one (Graves et al., 2006, section 4.1).

    Args:
        log_probs: `[n v]`, blank at 0.
        target: token ids without blanks.

    Raises:
        InputError: the target has a blank or a token that is not in the vocabulary, or needs more frames.
    """
    target = np.asarray(target, int)
    n, v = log_probs.shape
    if target.size and not (target.min() > BLANK and target.max() < v):
        raise InputError(f"the target has tokens outside 1 to {v - 1}: encode it without blanks")
    needed = len(target) + int(np.sum(target[1:] == target[:-1]))
    if n < max(1, needed):
        raise InputError(
            f"{n} frames for {needed} tokens and blanks between repeats: give longer audio"
        )
    states = np.full(2 * len(target) + 1, BLANK)
    states[1::2] = target
    skips = np.zeros(len(states), bool)
    skips[3::2] = target[1:] != target[:-1]
    scores = np.asarray(log_probs, np.float64)[:, states]
    best = np.full(len(states), -np.inf)
    best[:2] = scores[0, :2]
    steps = np.zeros((n, len(states)), int)  # back to the state of the frame before
    for frame in range(1, n):
        stay, one, two = best, np.roll(best, 1), np.roll(best, 2)
        one[:1], two[~skips] = -np.inf, -np.inf
        choices = np.stack([stay, one, two])
        steps[frame] = np.argmax(choices, axis=0)
        best = np.max(choices, axis=0) + scores[frame]
    state = len(states) - 1
    if len(target) and best[-2] > best[-1]:
        state -= 1
    path = np.empty(n, int)
    for frame in range(n - 1, -1, -1):
        path[frame] = (state - 1) // 2 if state % 2 else -1
        state -= steps[frame, state]
    return path


def token_spans(alignment: np.ndarray) -> np.ndarray:
    """First frame of every token, and one past its last, int `[u 2]`, of what `align` returns."""
    tokens = alignment[alignment >= 0]
    frames = np.flatnonzero(alignment >= 0)
    count = tokens.max() + 1 if tokens.size else 0
    first = np.searchsorted(tokens, np.arange(count), "left")
    last = np.searchsorted(tokens, np.arange(count), "right") - 1
    return np.stack([frames[first], frames[last] + 1], axis=1) if count else np.zeros((0, 2), int)


def boundaries(spans: np.ndarray) -> np.ndarray:
    """Boundaries of spans `[u 2]`: the first start, the middle between each two neighbours, and the last end.

    CTC models label a frame or two of a token and leave the rest blank: where between two labels one token ends and the
    next begins they do not say, and the middle is the guess that is never off by more than half of the gap.
    """
    spans = np.asarray(spans, float)
    if not len(spans):
        return np.zeros(0)
    middle = (spans[:-1, 1] + spans[1:, 0]) / 2
    return np.concatenate([spans[:1, 0], middle, spans[-1:, 1]])


def pulse_edges(gates: np.ndarray) -> np.ndarray:
    """Edges at which any of the binary gates `[p n]` opens or closes, ascending, those of the utterance left out."""
    return np.flatnonzero(np.any(gates[:, 1:] != gates[:, :-1], axis=0)) + 1


def pulse_widths(gates: np.ndarray) -> np.ndarray:
    """Frames of every run of open gates in `[p n]`."""
    closed = np.zeros((len(gates), 1), bool)
    padded = np.concatenate([closed, gates.astype(bool), closed], axis=1)
    change = np.diff(padded.astype(int), axis=1)
    # In the order of np.nonzero, pulse by pulse, starts and ends come in pairs.
    return np.nonzero(change == -1)[1] - np.nonzero(change == 1)[1]


def count_matches(reference: np.ndarray, found: np.ndarray, tolerance: float) -> int:
    """The most pairs of a reference and a found time that are within the tolerance, each time in one pair at most.

    Args:
        reference: seconds, ascending.
        found: seconds, ascending.
        tolerance: seconds.
    """
    pairs = i = j = 0
    # The first two that can be paired may as well be: any other partner of either is at least as far along.
    while i < len(reference) and j < len(found):
        if abs(reference[i] - found[j]) <= tolerance + _ROUNDING:
            pairs, i, j = pairs + 1, i + 1, j + 1
        elif found[j] < reference[i]:
            j += 1
        else:
            i += 1
    return pairs


class Agreement(NamedTuple):
    """How well found times agree with reference times, over all utterances.

    precision: pairs / found.   recall: pairs / reference.   f1: 2 pairs / (found + reference).
    """

    precision: float
    recall: float
    f1: float


def agreement(
    references: Sequence[np.ndarray], founds: Sequence[np.ndarray], tolerance: float
) -> Agreement:
    """The agreement of times in seconds, ascending, one array an utterance; a ratio of nothing is 0."""
    pairs = sum(count_matches(r, f, tolerance) for r, f in zip(references, founds, strict=True))
    reference, found = (sum(map(len, times)) for times in (references, founds))
    return Agreement(
        pairs / max(1, found), pairs / max(1, reference), 2 * pairs / max(1, found + reference)
    )


def random_agreement(
    references: Sequence[np.ndarray],
    counts: Sequence[int],
    frames: Sequence[int],
    frame_seconds: float,
    tolerance: float,
    seed: int = 0,
) -> Agreement:
    """The mean over `DRAWS` of the agreement of as many edges in random places, all different.

    Args:
        references: see `agreement`.
        counts: edges of each utterance.
        frames: its frames.
        frame_seconds: of a frame.
        tolerance: seconds.
        seed: of the draws.
    """
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(DRAWS):
        drawn = [
            np.sort(random.choice(n - 1, count, replace=False) + 1) * frame_seconds
            for count, n in zip(counts, frames, strict=True)
        ]
        rows.append(agreement(references, drawn, tolerance))
    return Agreement(*np.mean(rows, axis=0).tolist())


def even_agreement(
    references: Sequence[np.ndarray],
    counts: Sequence[int],
    frames: Sequence[int],
    frame_seconds: float,
    tolerance: float,
) -> Agreement:
    """The agreement of as many edges at equal distances; arguments as of `random_agreement`."""
    even = [
        np.linspace(0.0, n * frame_seconds, count + 2)[1:-1]
        for count, n in zip(counts, frames, strict=True)
    ]
    return agreement(references, even, tolerance)
