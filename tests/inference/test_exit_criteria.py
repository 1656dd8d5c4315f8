"""Scores of the exit rules against NumPy, under padding; transcripts against the tokenizer's collapse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.data.tokenizer import ctc_collapse
from edgespeech.inference.exit_criteria import (
    all_exit_scores,
    exits_agreeing,
    greedy_tokens,
    layer_similarity,
    mean_entropy,
    mean_max_probability,
    nbest_posterior,
)
from edgespeech.ops.ctc import greedy_path
from edgespeech.ops.ctc_beam import ctc_beam_search_reference
from tests.support.contracts import padding_contract

LENGTHS = np.array([7, 4, 2, 1])


def random(seed, d=5):
    return 2 * np.random.default_rng(seed).normal(size=(4, 7, d))


def probabilities(logits):
    p = np.exp(np.float64(logits))
    return p / p.sum(-1, keepdims=True)


def score(function, x):
    """`[b 1]` of a function of logits, under the padding contract."""
    run = jax.jit(lambda x, lengths: function(x, lengths)[:, None])
    out = padding_contract(run, np.float32(x), LENGTHS, rows=(1,), out_length=lambda n: 1)
    return out[:, 0]


def test_entropy_in_nats_per_frame():
    x = random(0)
    got = score(mean_entropy, x)
    for row, n in enumerate(LENGTHS):
        p = probabilities(x[row, :n])
        assert got[row] == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=1e-5)
    uniform = mean_entropy(jnp.zeros((1, 3, 8)), jnp.array([3]))
    assert float(uniform[0]) == pytest.approx(np.log(8), rel=1e-6)


def test_max_probability():
    x = random(0)
    got = score(mean_max_probability, x)
    for row, n in enumerate(LENGTHS):
        assert got[row] == pytest.approx(probabilities(x[row, :n]).max(-1).mean(), rel=1e-5)


def test_posterior():
    x = random(0)
    got = score(functools.partial(nbest_posterior, n_best=3), x)
    for row, n in enumerate(LENGTHS):
        beams = ctc_beam_search_reference(np.log(probabilities(x[row, :n])), 3)
        shares = np.exp([score for _, score in beams])
        assert got[row] == pytest.approx(shares[0] / shares.sum(), rel=1e-4)
    alone = nbest_posterior(jnp.float32(x), jnp.asarray(LENGTHS), 1)
    np.testing.assert_array_equal(alone, np.ones(4))


def test_similarity():
    x, y = random(0), random(1)
    both = np.concatenate([x, y], axis=-1)
    got = score(lambda z, n: layer_similarity(z[..., :5], z[..., 5:], n), both)
    for row, n in enumerate(LENGTHS):
        a, b = x[row, :n], y[row, :n]
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert got[row] == pytest.approx(cosine.mean(), rel=1e-4, abs=1e-6)
    same = layer_similarity(jnp.float32(x), 3 * jnp.float32(x), jnp.asarray(LENGTHS))
    np.testing.assert_allclose(same, 1.0, rtol=1e-5)


def test_greedy_tokens():
    # Few labels: many repeats and blanks.
    logits = np.random.default_rng(3).normal(size=(40, 7, 3)).astype(np.float32)
    lengths = np.arange(40) % 8
    tokens = np.asarray(greedy_tokens(logits, lengths))
    assert tokens.shape == (40, 7)
    for row, path in enumerate(np.asarray(greedy_path(logits, lengths))):
        want = ctc_collapse(path)
        assert tokens[row].tolist() == want + [0] * (7 - len(want))


def test_patience_counts_exits_that_agree():
    a, b = jnp.array([[1, 2, 0]] * 2), jnp.array([[1, 2, 0], [1, 0, 0]])
    first = exits_agreeing(a, jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32))
    np.testing.assert_array_equal(first, [1, 1])
    second = exits_agreeing(b, a, first)
    np.testing.assert_array_equal(second, [2, 1])
    np.testing.assert_array_equal(exits_agreeing(b, b, second), [3, 2])
    # An empty transcript at the first exit agrees with nothing.
    empty = jnp.zeros((1, 3), jnp.int32)
    np.testing.assert_array_equal(exits_agreeing(empty, empty, jnp.zeros(1, jnp.int32)), [1])


def test_all_exits():
    h = [jnp.float32(random(seed)) for seed in range(4)]
    logits = [jnp.float32(random(0, 3)), jnp.float32(random(0, 3)), jnp.float32(random(9, 3))]
    lengths = jnp.asarray(LENGTHS)

    def scores(rule):
        return all_exit_scores(rule, h[0], h[1:], logits, lengths, 3)

    got, tokens = scores("similarity")
    assert got.shape == (3, 4)
    for m in range(3):
        want = layer_similarity(h[m], h[m + 1], lengths)
        np.testing.assert_array_equal(got[m], want)
        np.testing.assert_array_equal(tokens[m], greedy_tokens(logits[m], lengths))
    patience = np.asarray(scores("patience")[0])
    np.testing.assert_array_equal(patience[:2], [[1] * 4, [2] * 4])
    changed = np.any(np.asarray(tokens[2] != tokens[1]), axis=1)
    np.testing.assert_array_equal(patience[2], np.where(changed, 1, 3))
    assert changed.any()
    for rule, function in (
        ("entropy", mean_entropy),
        ("max_probability", mean_max_probability),
        ("posterior", functools.partial(nbest_posterior, n_best=3)),
    ):
        np.testing.assert_allclose(scores(rule)[0][2], function(logits[2], lengths), rtol=1e-6)
