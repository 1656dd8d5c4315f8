"""N-best scores: every label sequence by enumeration, a plain beam, padding."""

import itertools
import math
from collections import defaultdict

import jax
import numpy as np

from edgespeech.ops.ctc_nbest import IMPOSSIBLE, ctc_nbest_scores
from tests.support.contracts import padding_contract

nbest = jax.jit(ctc_nbest_scores, static_argnums=2)


def log_softmax(z):
    z = np.float64(z)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def every_sequence(log_probs):
    """Log probability of each label sequence, by summing all paths."""
    n, v = log_probs.shape
    totals = defaultdict(float)
    for path in itertools.product(range(v), repeat=n):
        labels = tuple(label for label, _ in itertools.groupby(path) if label)
        totals[labels] += math.exp(sum(log_probs[i, label] for i, label in enumerate(path)))
    return sorted(map(math.log, totals.values()), reverse=True)


def beam_search(log_probs, size):
    """Prefix beam search over dicts: probabilities of paths that end in a blank and in the label."""
    beams = {(): (1.0, 0.0)}
    for frame in np.exp(log_probs):
        grown = defaultdict(lambda: [0.0, 0.0])
        for prefix, (blank, label) in beams.items():
            grown[prefix][0] += (blank + label) * frame[0]
            if prefix:
                grown[prefix][1] += label * frame[prefix[-1]]
            for c in range(1, len(frame)):
                before = blank if prefix and c == prefix[-1] else blank + label
                grown[(*prefix, c)][1] += before * frame[c]
        best = sorted(grown.items(), key=lambda item: -sum(item[1]))[:size]
        beams = dict(best)
    return sorted((math.log(sum(p)) for p in beams.values()), reverse=True)


def test_wide_beam_is_exact():
    logits = np.random.default_rng(0).normal(size=(2, 4, 3))
    got = nbest(np.float32(logits), np.array([4, 2]), 40)
    for row, n in enumerate((4, 2)):
        want = every_sequence(log_softmax(logits[row, :n]))
        np.testing.assert_allclose(got[row, : len(want)], want, rtol=1e-4)
        assert (got[row, len(want) :] <= IMPOSSIBLE / 2).all()


def test_narrow_beam():
    logits = 1.5 * np.random.default_rng(1).normal(size=(3, 12, 6))
    lengths = np.array([12, 7, 1])
    out = padding_contract(
        lambda x, n: nbest(x, n, 4)[:, None],
        np.float32(logits),
        lengths,
        out_length=lambda n: 1,
        rows=(1,),
    )
    for row, n in enumerate(lengths):
        want = beam_search(log_softmax(logits[row, :n]), 4)
        np.testing.assert_allclose(out[row, 0], want, rtol=1e-4)


def test_no_frames_have_the_empty_sequence_alone():
    got = nbest(np.full((1, 3, 4), np.nan, np.float32), np.array([0]), 2)
    np.testing.assert_allclose(got[0], [0.0, IMPOSSIBLE])
