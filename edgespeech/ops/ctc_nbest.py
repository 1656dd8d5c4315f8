"""Prefix beam search for CTC, for the scores of the N best label sequences (Hannun et al., 2014, arXiv 1408.2873)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from edgespeech.ops.ctc import BLANK, ctc_log_probs
from edgespeech.types import Array, Float, Int, Lengths, Logits

IMPOSSIBLE = -1e30  # log probability; finite, so that sums of two stay so
_HASH_FACTOR = 0x9E3779B1


class _Beams(NamedTuple):
    """N label sequences: a hash and the last label of each, and the log probability of its paths so far."""

    hashes: Int[Array, "k"]
    last: Int[Array, "k"]
    blank: Float[Array, "k"]  # of paths that end in a blank
    label: Float[Array, "k"]  # of paths that end in the last label


def ctc_nbest_scores(logits: Logits, lengths: Lengths, n_best: int) -> Float[Array, "b k"]:
    """`log sum over alignments of p` of the k = n_best label sequences that a beam of n_best keeps, best first.

    Every frame each sequence stays (by a blank or by its last label again) or grows by a label; paths that give one
    sequence are summed; the n_best most likely sequences go on. With a beam that holds every sequence the scores are
    exact. Sequences are told apart by a 32-bit hash. A score without a sequence is -1e30.

    Args:
        logits: `[b n v]`, unnormalised, blank at 0.
        lengths: `[b]`, valid frames; what is beyond has no part in it.
        n_best: at least 1.
    """
    search = jax.vmap(lambda log_probs, length: _search(log_probs, length, n_best))
    return search(ctc_log_probs(logits), lengths)


def _search(log_probs: Float[Array, "n v"], length: Array, size: int) -> Float[Array, "k"]:
    nothing = jnp.full(size, IMPOSSIBLE)
    beams = _Beams(
        jnp.zeros(size, jnp.uint32), jnp.zeros(size, jnp.int32), nothing.at[0].set(0.0), nothing
    )

    def step(beams: _Beams, frame):
        index, scores = frame
        grown = _grow(beams, scores)
        return jax.tree.map(
            lambda new, old: jnp.where(index < length, new, old), grown, beams
        ), None

    beams, _ = jax.lax.scan(step, beams, (jnp.arange(len(log_probs)), log_probs))
    return jnp.sort(jnp.logaddexp(beams.blank, beams.label), descending=True)


def _grow(beams: _Beams, scores: Float[Array, "v"]) -> _Beams:
    """One frame further."""
    size, vocab_size = len(beams.last), len(scores)
    total = jnp.logaddexp(beams.blank, beams.label)
    stays_blank = total + scores[BLANK]
    stays_label = jnp.where(beams.last == BLANK, IMPOSSIBLE, beams.label + scores[beams.last])

    labels = jnp.arange(vocab_size)
    # The last label again makes a new label only after a blank.
    before = jnp.where(labels == beams.last[:, None], beams.blank[:, None], total[:, None])
    grows = jnp.where(labels == BLANK, IMPOSSIBLE, before + scores)
    hashes = beams.hashes[:, None] * jnp.uint32(_HASH_FACTOR) + labels.astype(jnp.uint32)

    # Where beam i grown by the last label of beam j is beam j, its paths belong to j.
    alive = (total > IMPOSSIBLE / 2) & (beams.last != BLANK)
    same = (hashes[:, beams.last] == beams.hashes) & alive & (total > IMPOSSIBLE / 2)[:, None]
    joining = jnp.where(same, grows[:, beams.last], IMPOSSIBLE)
    stays_label = jnp.logaddexp(stays_label, jax.nn.logsumexp(joining, axis=0))
    joined = jnp.zeros((size, vocab_size), bool).at[:, beams.last].max(same)
    grows = jnp.where(joined, IMPOSSIBLE, grows)

    candidates = jnp.concatenate([jnp.logaddexp(stays_blank, stays_label), grows.ravel()])
    _, chosen = jax.lax.top_k(candidates, size)
    stayed = chosen < size
    kept = jnp.where(stayed, chosen, 0)
    i, label = jnp.divmod(jnp.where(stayed, 0, chosen - size), vocab_size)
    return _Beams(
        jnp.where(stayed, beams.hashes[kept], hashes[i, label]),
        jnp.where(stayed, beams.last[kept], label.astype(jnp.int32)),
        jnp.where(stayed, stays_blank[kept], IMPOSSIBLE),
        jnp.where(stayed, stays_label[kept], grows[i, label]),
    )
