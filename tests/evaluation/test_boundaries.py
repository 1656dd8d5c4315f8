"""Alignment against every path there is, matching against every matching, and edges by hand."""

import itertools

import numpy as np
import pytest

from edgespeech.data.tokenizer import ctc_collapse
from edgespeech.errors import InputError
from edgespeech.evaluation.boundaries import (
    DRAWS,
    agreement,
    align,
    boundaries,
    count_matches,
    even_agreement,
    pulse_edges,
    pulse_widths,
    random_agreement,
    token_spans,
)


def all_paths(n, v, target):
    for path in itertools.product(range(v), repeat=n):
        if ctc_collapse(np.array(path)) == list(target):
            yield path


@pytest.mark.parametrize("target", [[1], [1, 2], [1, 1], [2, 1, 2], [1, 2, 2], []])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_alignment_is_the_best_of_all_paths(target, seed):
    n, v = 6, 3
    logits = 2 * np.random.default_rng(seed).normal(size=(n, v))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    scores = {
        path: sum(log_probs[i, label] for i, label in enumerate(path))
        for path in all_paths(n, v, target)
    }
    best = max(scores, key=scores.get)
    found = align(log_probs, target)
    assert [target[i] if i >= 0 else 0 for i in found] == list(best)
    # The tokens come in order, each on at least one frame.
    assert sorted(set(found) - {-1}) == list(range(len(target)))
    assert (np.diff(found[found >= 0]) >= 0).all()


def test_alignment_of_just_enough_frames():
    log_probs = np.log(np.full((4, 3), 1 / 3))
    assert align(log_probs, [1, 1, 2]).tolist() == [0, -1, 1, 2]
    with pytest.raises(InputError, match="4 frames for 5 tokens and blanks"):
        align(log_probs, [1, 1, 1])
    with pytest.raises(InputError, match="tokens outside 1 to 2"):
        align(log_probs, [1, 0])
    with pytest.raises(InputError, match="tokens outside 1 to 2"):
        align(log_probs, [3])


def test_spans_and_boundaries_by_hand():
    alignment = np.array([-1, 0, 0, -1, -1, 1, 2, -1, 2, -1])
    spans = token_spans(alignment)
    assert spans.tolist() == [[1, 3], [5, 6], [6, 9]]
    assert boundaries(spans).tolist() == [1, 4, 6, 9]
    assert boundaries(spans[:1]).tolist() == [1, 3]
    nothing = token_spans(np.full(4, -1))
    assert nothing.shape == (0, 2)
    assert boundaries(nothing).tolist() == []


def test_edges_and_widths_by_hand():
    gates = np.array([[1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]], bool)
    assert pulse_edges(gates).tolist() == [2, 3, 4, 5]
    assert pulse_edges(gates[:1]).tolist() == [2, 4, 5]
    assert pulse_edges(gates[2:]).tolist() == []
    assert pulse_widths(gates).tolist() == [2, 1, 3, 6]
    assert pulse_widths(np.zeros((2, 4), bool)).tolist() == []


def most_pairs(reference, found, tolerance):
    """Over every way to pair them."""
    if not len(reference) or not len(found):
        return 0
    without = most_pairs(reference[1:], found, tolerance)
    ways = [
        1 + most_pairs(reference[1:], np.delete(found, j), tolerance)
        for j in range(len(found))
        if abs(reference[0] - found[j]) <= tolerance
    ]
    return max([without, *ways])


@pytest.mark.parametrize("seed", range(20))
def test_matches_are_the_most_there_can_be(seed):
    random = np.random.default_rng(seed)
    reference, found = (np.sort(random.uniform(0, 1, size)) for size in random.integers(0, 7, 2))
    for tolerance in (0.0, 0.05, 0.2, 2.0):
        expected = most_pairs(reference, found, tolerance)
        assert count_matches(reference, found, tolerance) == expected


def test_the_tolerance_itself_counts():
    assert count_matches(np.array([0.3]), np.array([3 * 0.08 + 0.02]), 0.04) == 1
    assert count_matches(np.array([0.1 + 0.2]), np.array([0.26]), 0.04) == 1
    assert count_matches(np.array([0.3]), np.array([0.2599]), 0.04) == 0


def test_agreement_is_pooled():
    references = [np.array([0.1, 0.5, 0.9]), np.array([0.2])]
    founds = [np.array([0.11, 0.52, 0.7, 0.71]), np.zeros(0)]
    precision, recall, f1 = agreement(references, founds, 0.03)
    assert (precision, recall) == (2 / 4, 2 / 4)
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert agreement([np.zeros(0)], [np.zeros(0)], 0.03) == (0, 0, 0)
    found_more = agreement(references, [*founds[:1], np.array([0.9, 1.0])], 0.03)
    assert found_more == pytest.approx((2 / 6, 2 / 4, 2 * 2 / 10))


def test_random_edges_agree_as_often_as_chance_says():
    """One boundary, `count` of the 99 inner edges, three of which are within the tolerance of it."""
    references, frame_seconds = [np.array([0.5])] * 40, 0.01
    count = 9
    found = random_agreement(references, [count] * 40, [100] * 40, frame_seconds, 0.012)
    chance = 1 - np.prod([(96 - i) / (99 - i) for i in range(count)])
    error = (chance * (1 - chance) / (40 * DRAWS)) ** 0.5
    assert abs(found.recall - chance) < 4 * error
    assert found.precision == pytest.approx(found.recall / count)
    assert found == random_agreement(references, [count] * 40, [100] * 40, frame_seconds, 0.012)
    every = random_agreement(references[:1], [99], [100], frame_seconds, 0.001)
    assert every.recall == 1.0


def test_even_edges():
    # 3 edges in 0.8 s: at 0.2, 0.4 and 0.6.
    found = even_agreement([np.array([0.21, 0.5, 0.6])], [3], [40], 0.02, 0.015)
    assert found == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert even_agreement([np.array([0.3])], [0], [40], 0.02, 0.015) == (0, 0, 0)
