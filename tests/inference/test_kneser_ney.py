"""Modified Kneser-Ney: against the formulas written out, n-gram by n-gram, over plain lists."""

import itertools
import math
import string

import numpy as np
import pytest

from edgespeech.errors import InputError
from edgespeech.inference.kneser_ney import FALLBACK_DISCOUNTS, estimate_ngrams
from edgespeech.inference.language_model import (
    END,
    START,
    UNKNOWN,
    perplexity,
    read_arpa,
    write_arpa,
)

WORDS = [
    *string.ascii_lowercase,
    *map("".join, itertools.product(string.ascii_lowercase, repeat=2)),
]


def zipf_texts(count=400, seed=0):
    """Sentences of the words a to z and aa to zz, the early ones far more often than the late ones."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, len(WORDS) + 1) ** 1.2
    return [
        " ".join(rng.choice(WORDS, p=share / share.sum(), size=rng.integers(1, 7)))
        for _ in range(count)
    ]


class Reference:
    """p(w | h) by the definitions; every count is taken from the sentences anew."""

    def __init__(self, texts, order, discounts=None):
        self.sentences = [[START, *text.split(), END] for text in texts]
        self.order = order
        words = {word for sentence in self.sentences for word in sentence[1:]}
        self.vocabulary = [*sorted(words), UNKNOWN]
        self.given = discounts
        self.windows = {
            n: [tuple(s[i : i + n]) for s in self.sentences for i in range(len(s) - n + 1)]
            for n in range(1, order + 1)
        }
        self.a = {
            n: {g: self.adjusted(g) for g in set(self.windows[n]) if g != (START,)}
            for n in self.windows
        }

    def adjusted(self, ngram):
        if len(ngram) == self.order or ngram[0] == START:
            return self.windows[len(ngram)].count(ngram)
        return len({g[0] for g in self.windows[len(ngram) + 1] if g[1:] == ngram})

    def discount(self, n, count):
        if count == 0:
            return 0.0
        k = min(count, 3)
        if self.given:
            return self.given[k - 1]
        t = [None] + [sum(a == i for a in self.a[n].values()) for i in (1, 2, 3, 4)]
        return k - (k + 1) * t[1] / (t[1] + 2 * t[2]) * t[k + 1] / t[k]

    def p(self, word, context):
        n = len(context) + 1
        behind = {g[-1]: a for g, a in self.a[n].items() if g[:-1] == context}
        shorter = self.p(word, context[1:]) if context else 1 / len(self.vocabulary)
        if not behind:
            return shorter
        total = sum(behind.values())
        count = behind.get(word, 0)
        freed = sum(self.discount(n, a) for a in behind.values())
        return (count - self.discount(n, count) + freed * shorter) / total


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_are_those_of_the_formulas(order):
    texts = zipf_texts()
    reference, model = Reference(texts, order), estimate_ngrams(texts, order)
    words = ["a", "b", "e", "zz", END, UNKNOWN]
    assert all(reference.discount(n, 1) != FALLBACK_DISCOUNTS[0] for n in range(1, order + 1))
    contexts = [(), ("a",), ("z",), (START,), ("a", "b"), (START, "a"), ("z", "z"), ("q", "a")]
    for word, context in itertools.product(words, contexts):
        if len(context) >= order:
            continue
        expected = reference.p(word, context)
        assert math.exp(model.log_prob(word, context)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_add_up_to_one(order):
    model = estimate_ngrams(zipf_texts(), order)
    words = [ngram[0] for ngram in model.entries if len(ngram) == 1 and ngram != (START,)]
    assert {END, UNKNOWN} < set(words)
    for context in [(), (START,), ("a",), ("b", "a"), (START, "c", "a"), ("y", "x", "w")]:
        context = context[: order - 1]
        total = sum(math.exp(model.log_prob(word, context)) for word in words)
        assert total == pytest.approx(1.0, abs=1e-12)


def test_small_texts_take_the_fallback_discounts():
    texts = ["a b", "a c", "", "  "]
    model, reference = estimate_ngrams(texts, 2), Reference(texts[:2], 2, FALLBACK_DISCOUNTS)
    for word, context in itertools.product(["a", "b", END, UNKNOWN], [(), ("a",), (START,)]):
        expected = reference.p(word, context)
        assert math.exp(model.log_prob(word, context)) == pytest.approx(expected, rel=1e-12)
    # By hand: one word each comes before a, b and c, and two before </s>; five words with <unk>.
    expected = (1 - 0.5) / 5 + (3 * 0.5 + 1.0) / 5 / 5
    assert math.exp(model.log_prob("a", ())) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz"])
def test_file_gives_the_model_back(tmp_path, name):
    model = estimate_ngrams(zipf_texts(), 3)
    write_arpa(tmp_path / name, model)
    again = read_arpa(tmp_path / name)
    assert again.entries.keys() == model.entries.keys()
    for ngram, entry in model.entries.items():
        assert again.entries[ngram] == pytest.approx(entry, rel=1e-7)
    first = (tmp_path / name).read_bytes()
    write_arpa(tmp_path / name, estimate_ngrams(zipf_texts(), 3))
    assert (tmp_path / name).read_bytes() == first


def test_perplexity_by_hand():
    texts = zipf_texts()
    model = estimate_ngrams(texts, 2)
    fit = perplexity(model, ["a b", "", "b NEVER a"])
    logs = [
        model.log_prob(*given)
        for given in [
            ("a", (START,)), ("b", ("a",)), (END, ("b",)),
            ("b", (START,)), ("a", (UNKNOWN,)), (END, ("a",)),
        ]
    ]  # fmt: skip
    assert (fit.words, fit.unknown) == (5, 1)
    assert fit.perplexity == pytest.approx(math.exp(-np.mean(logs)), rel=1e-12)
    # What was trained on is foreseen better than other texts of the same kind.
    others = perplexity(model, zipf_texts(seed=1)).perplexity
    assert perplexity(model, texts).perplexity < others < len(WORDS)


def test_refusals():
    with pytest.raises(InputError, match="order 0"):
        estimate_ngrams(["a"], 0)
    with pytest.raises(InputError, match="no words"):
        estimate_ngrams(["", " "], 2)
    with pytest.raises(InputError, match=r"has the word </s>: take it out"):
        estimate_ngrams(["a </s> b"], 2)
    with pytest.raises(InputError, match="perplexity of no words"):
        perplexity(estimate_ngrams(["a"], 2), [" "])
