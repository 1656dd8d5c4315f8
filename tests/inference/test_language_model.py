"""The language model against its file's numbers, and the fused beam against every alignment and every text."""

import gzip
import itertools
import math
from collections import defaultdict

import numpy as np
import pytest

from edgespeech.data.tokenizer import CharTokenizer, ctc_collapse
from edgespeech.errors import InputError
from edgespeech.inference.fusion import FusionBeam, FusionConfig
from edgespeech.inference.language_model import Entry, NgramModel, read_arpa
from edgespeech.inference.words import token_texts
from edgespeech.ops.ctc_beam import ctc_beam_search_reference

ARPA = """written by hand
\\data\\
ngram 1=6
ngram 2=4
ngram 3=1

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.5
-0.8\t</s>
-0.4\tA\t-0.3
-0.7\tB\t-0.2
-0.9\tAB

\\2-grams:
-0.2\t<s> A\t-0.1
-0.3\tA B\t-0.6
-0.1\tB </s>
-0.6\tAB A

\\3-grams:
-0.05\t<s> A B
\\end\\
"""
EVERY = FusionConfig(beam_width=10_000, lm_weight=0.7, word_bonus=0.4, least_log_prob=-math.inf)


@pytest.fixture
def arpa(tmp_path):
    path = tmp_path / "words.arpa"
    path.write_text(ARPA)
    return path


def log10_probs(model, words):
    """Of each word of a text and of its end, base 10."""
    context, logs = model.start, []
    for word in [*words, "</s>"]:
        logs.append(model.log_prob(word, context) / math.log(10))
        context = model.after(context, word)
    return logs


def test_backing_off(arpa):
    """By hand, from the numbers of the file."""
    model = read_arpa(arpa)
    assert model.order == 3
    cases = {
        ("A", "B"): [-0.2, -0.05, -0.6 - 0.1],  # A B </s> lacks: back-off of A B, then B </s>
        ("B",): [-0.5 - 0.7, -0.1],  # <s> B lacks, and so does <s> B </s>: no back-off of its own
        ("A", "A"): [-0.2, -0.1 - 0.3 - 0.4, -0.3 - 0.8],
        ("AB", "A"): [-0.5 - 0.9, -0.6, -0.3 - 0.8],
        ("ZEBRA", "A"): [-0.5 - 1.0, -0.4, -0.3 - 0.8],  # <unk>
        (): [-0.5 - 0.8],
    }
    for words, want in cases.items():
        np.testing.assert_allclose(log10_probs(model, words), want, atol=1e-12, err_msg=words)


def test_unknown_word_without_unk():
    model = NgramModel({("A",): Entry(-1.0, 0.0)})
    assert model.order == 1
    assert model.start == model.after((), "A") == ()
    assert model.log_prob("B", ()) == pytest.approx(-10 * math.log(10))


def test_gzip_is_read(arpa):
    packed = arpa.with_suffix(".arpa.gz")
    packed.write_bytes(gzip.compress(arpa.read_bytes()))
    assert log10_probs(read_arpa(packed), ["A"]) == log10_probs(read_arpa(arpa), ["A"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("-0.7\tB\t-0.2", "x\tB\t-0.2", r"words.arpa, line 12: .* is not a logarithm of base 10"),
        ("-0.3\tA B\t-0.6", "-0.3\tA", "line 17: .* is not an n-gram of 2 words"),
        ("ngram 2=4", "ngram 2=x", "line 4: .* is not a count"),
        ("\\2-grams:", "\\7-grams:", "is not a section that the header counts"),
        ("-0.6\tAB A\n", "", "has 3 2-grams and its header promises 4"),
        ("\\end\\", "", "is no whole ARPA file"),
    ],
)
def test_broken_files_are_named(arpa, old, new, message):
    arpa.write_text(ARPA.replace(old, new))
    with pytest.raises(InputError, match=message):
        read_arpa(arpa)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(InputError, match="unreadable language model"):
        read_arpa(tmp_path / "none.arpa")
    (tmp_path / "binary").write_bytes(b"\xff\xfe mmap lm http://kheafield.com/code")
    with pytest.raises(InputError, match="give an ARPA file"):
        read_arpa(tmp_path / "binary")


TEXTS = ("", " ", "A", "B")  # blank, a space, two letters


def log_softmax(z):
    z = np.float64(z)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def acoustic_scores(log_probs):
    """Log p of every label sequence, by enumeration of the alignments."""
    n, v = log_probs.shape
    totals = defaultdict(float)
    for path in itertools.product(range(v), repeat=n):
        totals[tuple(ctc_collapse(path))] += math.exp(log_probs[range(n), path].sum())
    return {tokens: math.log(p) for tokens, p in totals.items()}


def text_score(words, config, model):
    """What a whole text adds, straight from the formula."""
    score = sum(config.word_bonus + config.hot_bonus * (w in config.hot_words) for w in words)
    if model is not None:
        score += config.lm_weight * sum(log10_probs(model, words)) * math.log(10)
    return score


@pytest.mark.parametrize("hot_words", [(), ("AB", "B")])
@pytest.mark.parametrize("has_model", [True, False])
def test_wide_beam_has_the_score_of_every_text(arpa, hot_words, has_model):
    model = read_arpa(arpa) if has_model else None
    config = FusionConfig(**(vars(EVERY) | {"hot_words": hot_words, "hot_bonus": 1.3}))
    log_probs = log_softmax(np.random.default_rng(3).normal(size=(5, 4)))
    found = FusionBeam(TEXTS, config, model)(log_probs)
    scores = acoustic_scores(log_probs)
    assert len(found) == len(scores)
    for hypothesis in found:
        words = "".join(TEXTS[token] for token in hypothesis.tokens).split()
        assert hypothesis.text == " ".join(words)
        assert hypothesis.acoustic == pytest.approx(scores[hypothesis.tokens], abs=1e-9)
        want = scores[hypothesis.tokens] + text_score(words, config, model)
        assert hypothesis.score == pytest.approx(want, abs=1e-9)
    assert found == sorted(found, key=lambda hypothesis: -hypothesis.score)


def test_without_weights_it_is_the_plain_beam():
    log_probs = log_softmax(2 * np.random.default_rng(1).normal(size=(14, 4)))
    config = FusionConfig(beam_width=5, least_log_prob=-math.inf)
    found = FusionBeam(TEXTS, config)(log_probs)
    want = ctc_beam_search_reference(log_probs, 5)
    assert [hypothesis.tokens for hypothesis in found] == [tokens for tokens, _ in want]
    np.testing.assert_allclose([h.score for h in found], [score for _, score in want])


def peaks(text, second_best, margin):
    """Log probabilities of a text with a blank between its letters; `second_best` is `margin` nats behind."""
    texts = token_texts(CharTokenizer())
    scores = np.full((2 * len(text), len(texts)), -30.0)
    for i, (letter, other) in enumerate(zip(text, second_best, strict=True)):
        scores[2 * i, texts.index(letter)] = 0.0
        scores[2 * i, texts.index(other)] = max(scores[2 * i, texts.index(other)], -margin)
        scores[2 * i + 1, 0] = 0.0
    return log_softmax(scores)


def test_language_model_and_hot_words_change_the_text(tmp_path):
    texts = token_texts(CharTokenizer())
    log_probs = peaks("I SEA IT", "I SEE IT", 1.0)
    path = tmp_path / "lm.arpa"
    path.write_text(
        "\\data\\\nngram 1=3\n\\1-grams:\n-1\tSEE\n-3\tSEA\n-2\t<unk>\n\\end\\\n", encoding="utf-8"
    )
    model = read_arpa(path)

    def best(**settings):
        lm = model if settings.pop("lm", False) else None
        return FusionBeam(texts, FusionConfig(**settings), lm)(log_probs)[0].text

    assert best() == "I SEA IT"
    assert best(lm=True, lm_weight=0.5) == "I SEE IT"  # 0.5 * 2 * ln 10 = 2.3 nats > 1
    assert best(lm=True, lm_weight=0.2) == "I SEA IT"  # 0.9 nats < 1
    assert best(hot_words=("SEE",), hot_bonus=1.2) == "I SEE IT"
    assert best(hot_words=("SEE",), hot_bonus=0.8) == "I SEA IT"
    # With a beam of 1 the word must lead while it is being spelled.
    assert best(hot_words=("SEE",), hot_bonus=4.0, beam_width=1) == "I SEE IT"


def test_special_tokens_are_never_said():
    log_probs = np.log(np.array([[0.01, 0.9, 0.09], [0.98, 0.01, 0.01]]))
    found = FusionBeam(("", "", "A"), FusionConfig())(log_probs)
    assert found[0].text == "A"
    assert all(1 not in hypothesis.tokens for hypothesis in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beam_width": 0}, "beam_width is 0"),
        ({"lm_weight": -1.0}, "lm_weight is -1.0"),
        ({"hot_words": ("NEW YORK",)}, "'NEW YORK' is not one word"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        FusionConfig(**settings)
