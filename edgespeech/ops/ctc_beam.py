"""CTC prefix beam search that returns the label sequences (Hannun et al., 2014, arXiv 1408.2873), jitted and batched.

    p(l) = sum over alignments of l of prod_i p(label of frame i)

A beam holds the k most likely prefixes. Of each it keeps two probabilities, that of the alignments so far that end in a
blank and of those that end in the last label, because only after a blank does the last label again make a new label.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from edgespeech.errors import InputError
from edgespeech.ops.ctc import BLANK, ctc_log_probs
from edgespeech.types import Array, Bool, Float, Int, Lengths, Logits

IMPOSSIBLE = -1e30  # log probability; finite, so that sums of two stay so
# Prefixes are told apart by two 32-bit polynomial hashes.
_FACTORS = (0x9E3779B1, 0x85EBCA77)


class CTCBeams(NamedTuple):
    """The k best label sequences of each utterance, best first.

    Attributes:
        tokens: `[b k n]`, int32, 0 behind the sequence.
        lengths: `[b k]`, int32, labels of each.
        scores: `[b k]`, `log p(l)` over the alignments that the beam kept; -1e30 where there is no sequence.
    """

    tokens: Int[Array, "b k n"]
    lengths: Int[Array, "b k"]
    scores: Float[Array, "b k"]


class _Beams(NamedTuple):
    """The k prefixes: hashes, last label (0: none yet), and log probabilities by how their alignments end."""

    hashes: Int[Array, "k 2"]
    last: Int[Array, "k"]
    blank: Float[Array, "k"]
    label: Float[Array, "k"]


class _Origin(NamedTuple):
    """Where a beam came from: the beam of the frame before, and the label that it gained (0: none)."""

    parent: Int[Array, "k"]
    gained: Int[Array, "k"]


def ctc_beam_search(logits: Logits, lengths: Lengths, beam_width: int) -> CTCBeams:
    """The beam_width best label sequences; what lies beyond a length has no part in them.

    Args:
        logits: `[b n v]`, unnormalised, any floating dtype, blank at 0; sums are in float32.
        lengths: `[b]`, valid frames.
        beam_width: k.

    Raises:
        InputError: beam_width below 1.
    """
    if beam_width < 1:
        raise InputError(f"beam_width is {beam_width}: give at least 1")
    search = jax.vmap(lambda log_probs, length: _search(log_probs, length, beam_width))
    return CTCBeams(*search(ctc_log_probs(logits), lengths))


def _search(log_probs: Float[Array, "n v"], length: Array, k: int) -> CTCBeams:
    nothing = jnp.full(k, IMPOSSIBLE)
    start = _Beams(
        jnp.zeros((k, 2), jnp.uint32), jnp.zeros(k, jnp.int32), nothing.at[0].set(0.0), nothing
    )
    unchanged = _Origin(jnp.arange(k, dtype=jnp.int32), jnp.zeros(k, jnp.int32))

    def step(beams: _Beams, frame):
        index, scores = frame
        grown = _grow(beams, scores)
        return jax.tree.map(
            lambda new, old: jnp.where(index < length, new, old), grown, (beams, unchanged)
        )

    beams, origins = jax.lax.scan(step, start, (jnp.arange(len(log_probs)), log_probs))
    scores, order = jax.lax.top_k(jnp.logaddexp(beams.blank, beams.label), k)
    tokens, count = _trace(origins, order)
    return CTCBeams(tokens, jnp.where(scores > IMPOSSIBLE / 2, count, 0), scores)


def _grow(beams: _Beams, scores: Float[Array, "v"]) -> tuple[_Beams, _Origin]:
    """One frame further."""
    k, v = len(beams.last), len(scores)
    labels = jnp.arange(v, dtype=jnp.int32)
    total = jnp.logaddexp(beams.blank, beams.label)
    blank = total + scores[BLANK]
    label = jnp.where(beams.last == BLANK, IMPOSSIBLE, beams.label + scores[beams.last])

    is_repeat = labels == beams.last[:, None]
    grown = jnp.where(is_repeat, beams.blank[:, None], total[:, None]) + scores
    grown = jnp.where(labels == BLANK, IMPOSSIBLE, grown)
    hashes = beams.hashes[:, None] * jnp.array(_FACTORS, jnp.uint32)
    hashes = hashes + labels.astype(jnp.uint32)[:, None]

    # A prefix that grows into one that is in the beam already gives it its probability.
    meets = _meets(beams, hashes, total > IMPOSSIBLE / 2)
    gained = jnp.where(meets, grown[:, beams.last], IMPOSSIBLE)
    label = jnp.logaddexp(label, jax.nn.logsumexp(gained, axis=0))
    given = jnp.zeros((k, v), bool).at[:, beams.last].max(meets)
    grown = jnp.where(given, IMPOSSIBLE, grown)

    candidates = jnp.concatenate([jnp.logaddexp(blank, label), grown.ravel()])
    _, chosen = jax.lax.top_k(candidates, k)
    stays = chosen < k
    parent, new = jnp.divmod(chosen - k, v)
    parent = jnp.where(stays, chosen, parent).astype(jnp.int32)
    new = jnp.where(stays, 0, new).astype(jnp.int32)
    return _Beams(
        jnp.where(stays[:, None], beams.hashes[parent], hashes[parent, new]),
        jnp.where(stays, beams.last[parent], new),
        jnp.where(stays, blank[parent], IMPOSSIBLE),
        jnp.where(stays, label[parent], grown[parent, new]),
    ), _Origin(parent, new)


def _meets(
    beams: _Beams, hashes: Int[Array, "k v 2"], alive: Bool[Array, "k"]
) -> Bool[Array, "k k"]:
    """Whether prefix i grown by the last label of prefix j is prefix j."""
    same = (hashes[:, beams.last] == beams.hashes).all(-1)
    return same & alive[:, None] & (alive & (beams.last != BLANK))


def _trace(origins: _Origin, beams: Int[Array, "k"]) -> tuple[Int[Array, "k n"], Int[Array, "k"]]:
    """Labels and their number of each beam of the last frame, from the frames' origins `[n k]`."""

    def back(at, origin: _Origin):
        return origin.parent[at], origin.gained[at]

    _, gained = jax.lax.scan(back, beams, origins, reverse=True)
    n, k = gained.shape
    place = jnp.where(gained > 0, jnp.cumsum(gained > 0, axis=0) - 1, n)
    tokens = jnp.zeros((k, n), jnp.int32)
    tokens = tokens.at[jnp.arange(k)[None, :], place].set(gained, mode="drop")
    return tokens, jnp.sum(gained > 0, axis=0, dtype=jnp.int32)


def ctc_beam_search_reference(
    log_probs: Sequence[Sequence[float]] | np.ndarray, beam_width: int
) -> list[tuple[tuple[int, ...], float]]:
    """`ctc_beam_search` of one utterance over a dict of prefixes, in float64: sequences and log probabilities.

    Args:
        log_probs: `[n v]`, normalised, blank at 0.
        beam_width: sequences kept at each frame.
    """
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (1.0, 0.0)}
    for frame in np.exp(np.asarray(log_probs, np.float64)):
        grown: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for prefix, (blank, label) in beams.items():
            grown[prefix][0] += (blank + label) * frame[BLANK]
            if prefix:
                grown[prefix][1] += label * frame[prefix[-1]]
            for new in range(1, len(frame)):
                is_repeat = bool(prefix) and new == prefix[-1]
                grown[(*prefix, new)][1] += (blank if is_repeat else blank + label) * frame[new]
        best = sorted(grown.items(), key=lambda item: -sum(item[1]))[:beam_width]
        beams = {prefix: (blank, label) for prefix, (blank, label) in best}
    with np.errstate(divide="ignore"):
        return [(prefix, float(np.log(sum(parts)))) for prefix, parts in beams.items()]
