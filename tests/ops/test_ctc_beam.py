"""Label sequences of the beam: every alignment by enumeration, the plain beam, padding, and the greedy path."""

import functools
import itertools
import math
from collections import defaultdict

import jax
import numpy as np
import pytest

from edgespeech.data.tokenizer import ctc_collapse
from edgespeech.errors import InputError
from edgespeech.ops.ctc import ctc_log_probs
from edgespeech.ops.ctc_beam import IMPOSSIBLE, ctc_beam_search, ctc_beam_search_reference

search = jax.jit(ctc_beam_search, static_argnums=2)


def log_softmax(z):
    z = np.float64(z)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def sequences(beams, row):
    """Sequences and scores of one utterance."""
    tokens, lengths, scores = (np.asarray(part[row]) for part in beams)
    return [
        (tuple(t[:n].tolist()), float(score))
        for t, n, score in zip(tokens, lengths, scores, strict=True)
        if score > IMPOSSIBLE / 2
    ]


def assert_same(got, want):
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want]
    np.testing.assert_allclose(
        np.exp([score for _, score in got]), np.exp([score for _, score in want]), rtol=1e-5
    )


def every_sequence(log_probs):
    """Every sequence with its log probability, summed over all alignments, best first."""
    n, v = log_probs.shape
    totals = defaultdict(float)
    for path in itertools.product(range(v), repeat=n):
        totals[tuple(ctc_collapse(path))] += math.exp(
            sum(log_probs[i, label] for i, label in enumerate(path))
        )
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    return [(tokens, math.log(p)) for tokens, p in ordered]


def test_wide_beam_is_the_sum_over_all_alignments():
    logits = np.random.default_rng(0).normal(size=(3, 5, 3))
    lengths = np.array([5, 3, 1])
    beams = search(np.float32(logits), lengths, 80)
    for row, n in enumerate(lengths):
        want = every_sequence(log_softmax(logits[row, :n]))
        assert_same(sequences(beams, row), want)
        assert sum(math.exp(score) for _, score in want) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(5))
def test_narrow_beam_is_the_plain_one(seed):
    random = np.random.default_rng(seed)
    logits = np.float32(2 * random.normal(size=(4, 20, 7)))
    lengths = np.array([20, 13, 6, 1])
    # NaN beyond the lengths: it has no part in anything.
    padded = np.where(np.arange(20)[None, :, None] < lengths[:, None, None], logits, np.nan)
    beams = search(padded, lengths, 6)
    for row, n in enumerate(lengths):
        want = ctc_beam_search_reference(log_softmax(logits[row, :n]), 6)
        assert_same(sequences(beams, row), want)
    alone = search(logits[1:2, :13], lengths[1:2], 6)
    assert sequences(alone, 0) == sequences(beams, 1)


def test_repeats_need_a_blank():
    certain = np.full((1, 5, 3), -20.0, np.float32)
    certain[0, range(5), [1, 1, 0, 1, 2]] = 20.0
    beams = search(certain, np.array([5]), 2)
    assert sequences(beams, 0)[0][0] == (1, 1, 2)
    np.testing.assert_array_equal(beams.tokens[0, 0], [1, 1, 2, 0, 0])


def test_no_frames_have_the_empty_sequence_alone():
    beams = search(np.full((1, 3, 4), np.nan, np.float32), np.array([0]), 2)
    assert sequences(beams, 0) == [((), 0.0)]
    np.testing.assert_array_equal(beams.lengths, [[0, 0]])


def test_reference_sums_what_a_greedy_path_leaves_out():
    # Two alignments of (1,) at 0.24 each beat the most likely path, two blanks at 0.36.
    log_probs = np.log([[0.6, 0.4], [0.6, 0.4]])
    (best, score), *_ = ctc_beam_search_reference(log_probs, 4)
    assert best == (1,)
    assert score == pytest.approx(math.log(0.4 * 0.6 * 2 + 0.4 * 0.4))
    assert sequences(search(np.float32(log_probs)[None], np.array([2]), 4), 0)[0][0] == (1,)


def test_width_must_be_positive():
    with pytest.raises(InputError, match="beam_width is 0: give at least 1"):
        functools.partial(ctc_beam_search, beam_width=0)(np.zeros((1, 2, 3)), np.array([2]))


def test_unnormalised_logits_are_normalised():
    logits = np.float32(np.random.default_rng(2).normal(size=(1, 4, 3)))
    shifted = search(logits + 7.0, np.array([4]), 3)
    np.testing.assert_allclose(
        shifted.scores, search(ctc_log_probs(logits), np.array([4]), 3).scores, atol=1e-5
    )
