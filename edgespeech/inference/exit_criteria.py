"""Scores that an exit rule compares with its threshold, computed on the device (arXiv 2309.09546, section on exits).

| rule | score of an exit | an utterance leaves |
|---|---|---|
| `entropy` | mean over frames of `-sum_v p log p`, nats per frame | at or below the threshold |
| `posterior` | `exp(s_1) / sum_k exp(s_k)` over the N best label sequences | at or above |
| `max_probability` | mean over frames of `max_v p` | at or above |
| `similarity` | mean over frames of the cosine of the block's input and output | at or above |
| `patience` | exits in a row, this one included, with this greedy transcript | at or above (2: two agree) |

The entropy is not divided by the vocabulary's size, as upstream's is, so that thresholds do not hang on it. `patience`
is ours for transcripts (after Zhou et al., 2020, arXiv 2006.04152).
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from edgespeech.ops.ctc import BLANK, ctc_log_probs, greedy_path
from edgespeech.ops.ctc_beam import ctc_beam_search
from edgespeech.ops.edit_distance import edit_distance
from edgespeech.ops.mask import mask_from_lengths, masked_mean, zero_padding
from edgespeech.types import Array, Float, Frames, Int, Lengths, Logits

ExitRule = Literal["entropy", "posterior", "max_probability", "similarity", "patience"]


def mean_entropy(logits: Logits, lengths: Lengths) -> Float[Array, "b"]:
    """`mean_i -sum_v p_iv log p_iv` over valid frames, nats per frame; 0 without frames."""
    log_probs, mask = _valid_log_probs(logits, lengths)
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    return masked_mean(entropy, mask, axis=1)[:, 0]


def mean_max_probability(logits: Logits, lengths: Lengths) -> Float[Array, "b"]:
    """`mean_i max_v p_iv` over valid frames; 0 without frames."""
    log_probs, mask = _valid_log_probs(logits, lengths)
    return masked_mean(jnp.exp(jnp.max(log_probs, axis=-1)), mask, axis=1)[:, 0]


def mean_label_probability(logits: Logits, lengths: Lengths) -> Float[Array, "b"]:
    """`mean_i (1 - p_i,blank)` over valid frames: how much of the time is labelled; 0 without frames."""
    log_probs, mask = _valid_log_probs(logits, lengths)
    return masked_mean(-jnp.expm1(log_probs[..., BLANK])[..., None], mask[..., None], axis=1)[
        :, 0, 0
    ]


def nbest_posterior(logits: Logits, lengths: Lengths, n_best: int) -> Float[Array, "b"]:
    """`exp(s_1) / sum_k exp(s_k)`, s the log probabilities of the n_best label sequences of a beam as wide.

    With n_best = 1 it is 1 for everything.
    """
    log_probs, _ = _valid_log_probs(logits, lengths)
    scores = ctc_beam_search(log_probs, lengths, n_best).scores
    return jax.nn.softmax(scores, axis=-1)[:, 0]


def layer_similarity(before: Frames, after: Frames, lengths: Lengths) -> Float[Array, "b"]:
    """`mean_i cos(before_i, after_i)` over valid frames; 0 without frames."""
    mask = mask_from_lengths(lengths, before.shape[1])
    x, y = (zero_padding(t.astype(jnp.float32), mask) for t in (before, after))
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    cosine = jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-12)
    return masked_mean(cosine, mask, axis=1)[:, 0]


def greedy_tokens(logits: Logits, lengths: Lengths) -> Int[Array, "b n"]:
    """The greedy transcript: repeats merged, blanks out, labels at the front and blanks after them."""
    path = greedy_path(logits, lengths)
    before = jnp.pad(path[:, :-1], ((0, 0), (1, 0)), constant_values=BLANK)
    kept = (path != BLANK) & (path != before)
    # What is not kept goes to one place more, which is then cut off.
    place = jnp.where(kept, jnp.cumsum(kept, axis=1) - 1, path.shape[1])
    rows = jnp.arange(len(path))[:, None]
    tokens = jnp.full((path.shape[0], path.shape[1] + 1), BLANK, path.dtype)
    return tokens.at[rows, place].set(path)[:, :-1]


def exits_agreeing(
    tokens: Int[Array, "b n"], previous_tokens: Int[Array, "b n"], previous: Int[Array, "b"]
) -> Int[Array, "b"]:
    """`patience`'s score: one more than the previous exit's if the transcripts are equal, else 1.

    Args:
        tokens: from `greedy_tokens`.
        previous_tokens: of the exit before.
        previous: its score; 0 before the first exit.
    """
    same = jnp.all(tokens == previous_tokens, axis=1) & (previous > 0)
    return jnp.where(same, previous + 1, 1)


def transcript_change(
    tokens: Int[Array, "b n"], previous_tokens: Int[Array, "b n"]
) -> Float[Array, "b"]:
    """Edit distance of the greedy transcripts of an exit and of the one before, by the longer's labels: 0 to 1.

    0 where both are empty. Before the first exit the transcript is empty: what says something changes by 1 there.

    Args:
        tokens: from `greedy_tokens`.
        previous_tokens: of the exit before.
    """
    now, before = (jnp.sum(t != BLANK, axis=1, dtype=jnp.int32) for t in (tokens, previous_tokens))
    distance = edit_distance(tokens, now, previous_tokens, before)
    return distance / jnp.maximum(jnp.maximum(now, before), 1)


def exit_score(
    rule: ExitRule,
    before: Frames,
    after: Frames,
    logits: Logits,
    lengths: Lengths,
    agreeing: Int[Array, "b"],
    n_best: int,
) -> Float[Array, "b"]:
    """The score of an exit under a rule; see the table above.

    Args:
        rule: which one.
        before: `[b n d]`, input of the exit's block.
        after: `[b n d]`, its output.
        logits: `[b n v]` of the exit.
        lengths: `[b]`.
        agreeing: `[b]`, from `exits_agreeing`.
        n_best: sequences of `posterior`.
    """
    if rule == "entropy":
        return mean_entropy(logits, lengths)
    if rule == "posterior":
        return nbest_posterior(logits, lengths, n_best)
    if rule == "max_probability":
        return mean_max_probability(logits, lengths)
    if rule == "similarity":
        return layer_similarity(before, after, lengths)
    return agreeing.astype(jnp.float32)


def all_exit_scores(
    rule: ExitRule,
    embedded: Frames,
    hidden: Sequence[Frames],
    exit_logits: Sequence[Logits],
    lengths: Lengths,
    n_best: int,
) -> tuple[Float[Array, "e b"], Int[Array, "e b n"]]:
    """Scores and greedy transcripts of every exit, from a pass through the whole model: what tuning needs.

    Args:
        rule: which one.
        embedded: `[b n d]`, input of the first block.
        hidden: `[b n d]`, output of every block.
        exit_logits: `[b n v]` of every exit.
        lengths: `[b]`.
        n_best: sequences of `posterior`.

    Returns:
        `[e b]` scores, and `[e b n]` as from `greedy_tokens`.
    """
    agreeing = jnp.zeros(lengths.shape, jnp.int32)
    tokens = jnp.zeros(embedded.shape[:2], jnp.int32)
    scores, transcripts = [], []
    for before, after, logits in zip((embedded, *hidden), hidden, exit_logits, strict=False):
        previous_tokens, tokens = tokens, greedy_tokens(logits, lengths)
        agreeing = exits_agreeing(tokens, previous_tokens, agreeing)
        scores.append(exit_score(rule, before, after, logits, lengths, agreeing, n_best))
        transcripts.append(tokens)
    return jnp.stack(scores), jnp.stack(transcripts)


def _valid_log_probs(logits: Logits, lengths: Lengths):
    mask = mask_from_lengths(lengths, logits.shape[1])
    return ctc_log_probs(zero_padding(logits, mask)), mask
