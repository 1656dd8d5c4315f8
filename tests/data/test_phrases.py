import re
from collections import Counter

import pytest

from edgespeech.data.phrases import MAX_WORDS, MIN_WORDS, SLOTS, TEMPLATES, sentences, vocabulary
from edgespeech.errors import InputError


def test_the_vocabulary_is_what_sentences_hold():
    words = vocabulary()
    assert 250 <= len(words) <= 350
    assert set(words) == {word for text in sentences(2400, (0, 0)) for word in text.split()}


def test_sentences_are_plain_distinct_and_of_bounded_length():
    made = sentences(1000, (3,))
    assert len(set(made)) == 1000
    for text in made:
        assert re.fullmatch(r"[A-Z']+( [A-Z']+)*", text)
        assert MIN_WORDS <= len(text.split()) <= MAX_WORDS
    lengths = Counter(len(text.split()) for text in made)
    assert {MIN_WORDS, MAX_WORDS} <= set(lengths)


def test_sentences_follow_the_seed_and_the_exclusion():
    first = sentences(200, (0, 1))
    assert sentences(200, (0, 1)) == first
    assert sentences(50, (0, 1)) == first[:50]
    assert sentences(200, (1, 1)) != first
    assert not set(sentences(200, (0, 1), exclude=first)) & set(first)


def test_the_grammar_has_no_dead_slot_and_runs_out_with_a_message(monkeypatch):
    used = {name for template in TEMPLATES for name in re.findall(r"\{(\w+)\}", template)}
    assert used == set(SLOTS)
    monkeypatch.setattr("edgespeech.data.phrases.TEMPLATES", ("CALL {owner} {relative}",))
    assert len(set(sentences(42, (0,)))) == 42
    with pytest.raises(InputError, match="after 42 of 43"):
        sentences(43, (0,))
