import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgespeech.data.tokenizer import (
    CharTokenizer,
    SentencePieceTokenizer,
    ctc_collapse,
    load_tokenizer,
    min_frames,
)
from edgespeech.errors import InputError

TEXTS = ["TURN ON THE LIGHT", "DON'T TURN THE LIGHT OFF", "THE OTHER LIGHT", "TURN AROUND"] * 3
sentences = st.lists(st.text("ABCXYZ'", min_size=1), min_size=1).map(" ".join)


def test_default_ids():
    tokenizer = CharTokenizer()
    assert (tokenizer.vocab_size, tokenizer.blank_id) == (29, 0)
    encoded = tokenizer.encode("A Z'")
    assert encoded.dtype == np.int32
    assert encoded.tolist() == [3, 1, 28, 2]
    assert tokenizer.decode([0, 1, 3, 1, 1, 28, 0, 2, 1]) == "A Z'"


@given(sentences)
def test_char_round_trip(text):
    tokenizer = CharTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_vocabulary_of_hugging_face():
    vocab = {"<s>": 1, "<pad>": 0, "</s>": 2, "<unk>": 3, "|": 4, "E": 5, "T": 6, "'": 7}
    tokenizer = CharTokenizer(vocab)
    assert (tokenizer.vocab_size, tokenizer.blank_id) == (8, 0)
    assert tokenizer.encode("TE ET").tolist() == [6, 5, 4, 5, 6]
    assert tokenizer.decode([1, 6, 3, 5, 2]) == "TE"
    assert tokenizer.can_encode("TEA| <") == {"A", "|", "<"}


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (["A", "|"], "lacks .*<pad>"),
        (["<pad>", "A"], r"lacks .*\|"),
        (["<pad>", "|", "A", "A"], "twice"),
        ({"<pad>": 0, "|": 2}, "0 to 1"),
    ],
)
def test_bad_vocabularies(vocabulary, message):
    with pytest.raises(InputError, match=message):
        CharTokenizer(vocabulary)


def test_unknown_characters_are_named():
    with pytest.raises(InputError, match=r"lacks \['7', 'É'\]"):
        CharTokenizer().encode("CAFÉ 7")
    assert CharTokenizer().can_encode("IT'S FINE") == set()


@pytest.mark.parametrize(("model_type", "size"), [("bpe", 30), ("unigram", 22)])
def test_sentencepiece(model_type, size, tmp_path):
    tokenizer = SentencePieceTokenizer.train(TEXTS, size, model_type)
    assert (tokenizer.vocab_size, tokenizer.blank_id) == (size, 0)
    for text in [*TEXTS, "LIGHT DON'T", "A"]:
        ids = tokenizer.encode(text)
        assert ids.min() > 1
        assert len(ids) <= len(text) + 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([0, *ids, 0]) == text
    assert tokenizer.can_encode("LIGHT 7Z") == {"7", "Z"}
    with pytest.raises(InputError, match="'7'"):
        tokenizer.encode("7")
    again = SentencePieceTokenizer.train(TEXTS, size, model_type)
    assert again._model == tokenizer._model
    tokenizer.save(tmp_path)
    np.testing.assert_array_equal(
        load_tokenizer(tmp_path).encode(TEXTS[1]), tokenizer.encode(TEXTS[1])
    )


def test_sentencepiece_errors():
    with pytest.raises(InputError, match="vocab_size 5000"):
        SentencePieceTokenizer.train(TEXTS, 5000)
    with pytest.raises(InputError, match="no text"):
        SentencePieceTokenizer.train([" "], 30)
    with pytest.raises(InputError, match="'word'"):
        SentencePieceTokenizer.train(TEXTS, 30, "word")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        SentencePieceTokenizer(b"rubbish")


def test_save_and_load_char(tmp_path):
    vocabulary = ["|", "<pad>", "B", "É"]
    CharTokenizer(vocabulary).save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert isinstance(loaded, CharTokenizer)
    assert loaded.vocabulary == tuple(vocabulary)
    assert loaded.blank_id == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"kind": "char"}', "damaged"),
        ('{"kind": "sentencepiece", "model": "%"}', "damaged"),
        ('{"kind": "pickle"}', "'pickle'"),
    ],
)
def test_load_refuses(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


def test_ctc_collapse():
    assert ctc_collapse([0, 1, 1, 0, 1, 2, 2, 0, 0, 3]) == [1, 1, 2, 3]
    assert ctc_collapse([2, 2, 1, 2], blank=2) == [1]
    assert ctc_collapse([]) == []


@given(st.lists(st.integers(0, 3), max_size=12))
def test_ctc_collapse_is_groupby_then_filter(path):
    assert ctc_collapse(path) == [label for label, _ in itertools.groupby(path) if label]


@given(st.lists(st.integers(1, 2), max_size=4))
def test_min_frames_is_the_shortest_path_that_collapses_to_the_labels(labels):
    shortest = next(
        frames
        for frames in itertools.count()
        if any(ctc_collapse(path) == labels for path in itertools.product(range(3), repeat=frames))
    )
    assert min_frames(labels) == shortest
