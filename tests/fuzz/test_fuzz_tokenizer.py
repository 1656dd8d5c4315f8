"""Damaged tokenizers: one that turns ids into text, or a message."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given

from edgespeech.data.tokenizer import CharTokenizer, SentencePieceTokenizer, load_tokenizer
from edgespeech.interop.moonshine_tokenizer import (
    PieceTokenizer,
    load_piece_tokenizer,
    read_tokenizer_bin,
    read_tokenizer_json,
)
from tests.fuzz.damage import bounded, damaged, damaged_json, fuzz, read_or_refuse

CHARACTERS = {"kind": "char", "vocabulary": ["<pad>", "|", "'", "A", "B"]}
PIECES = {"kind": "pieces", "vocab_size": 6, "pieces": [None, None, "a", "\xe2\x96\x81b", "c"]}
HUGGING_FACE = {
    "model": {"type": "BPE", "vocab": {"<unk>": 0, "<s>": 1, "<0xC3>": 2, "▁the": 3, "re": 4}},
    "added_tokens": [{"id": 0, "content": "<unk>", "special": True}],
}
VOCABULARY = 6
UNITS = SentencePieceTokenizer.train(["THE THEN THERE", "ON AND ON", "DON'T"], 24)
PROTO = base64.b64decode(UNITS._description()["model"])
BIN = b"".join(bytes([len(p)]) + p for p in (b"<unk>", b"<s>", b"a", b"\xc3", b"re"))
BIN += bytes([128 + 200 % 128, 200 // 128]) + b"x" * 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


def check(tokenizer):
    """It gives text for every one of its first ids, and ids of its own for text."""
    if tokenizer is None:
        return
    with bounded():
        ids = range(min(tokenizer.vocab_size, 64))
        assert isinstance(tokenizer.decode(ids), str)
        for i in ids:
            text = tokenizer.decode([i])
            if text and not tokenizer.can_encode(text):
                found = np.asarray(tokenizer.encode(text))
                assert ((found >= 0) & (found < tokenizer.vocab_size)).all()


def read(load, folder, name, content, *arguments):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    check(read_or_refuse(load, *(arguments or (folder,))))


def test_sound_files_are_read(folder):
    for load, content in ((load_tokenizer, CHARACTERS), (load_piece_tokenizer, PIECES)):
        (folder / "tokenizer.json").write_text(json.dumps(content))
        assert load(folder).vocab_size == len(content.get("vocabulary", range(6)))
    assert isinstance(load_tokenizer(_saved(folder, CharTokenizer())), CharTokenizer)
    assert load_tokenizer(_saved(folder, UNITS)).decode(UNITS.encode("THEN")) == "THEN"
    assert isinstance(
        load_piece_tokenizer(_saved(folder, PieceTokenizer([b"a"], 3))), PieceTokenizer
    )
    (folder / "t.bin").write_bytes(BIN)
    assert read_tokenizer_bin(folder / "t.bin", VOCABULARY, (0, 1)).decode([2, 4]) == "are"


def _saved(folder, tokenizer):
    tokenizer.save(folder)
    return folder


@fuzz(120)
@given(content=damaged_json(CHARACTERS))
def test_characters(content, folder):
    read(load_tokenizer, folder, "tokenizer.json", content)


@fuzz(120)
@given(content=damaged_json(PIECES))
def test_pieces(content, folder):
    read(load_piece_tokenizer, folder, "tokenizer.json", content)


@fuzz(120)
@given(content=damaged_json(HUGGING_FACE))
def test_hugging_face(content, folder):
    path = folder / "hf.json"
    read(read_tokenizer_json, folder, path.name, content, path, VOCABULARY)


@fuzz(150)
@given(data=damaged(BIN))
def test_bin(data, folder):
    path = folder / "t.bin"
    read(read_tokenizer_bin, folder, path.name, data, path, VOCABULARY, (0, 1))


@fuzz(150)
@given(proto=damaged(PROTO))
def test_sentencepiece(proto, folder):
    content = {"kind": "sentencepiece", "model": base64.b64encode(proto).decode()}
    read(load_tokenizer, folder, "tokenizer.json", content)


@fuzz(80)
@given(
    data=damaged(*(json.dumps(content).encode() for content in (CHARACTERS, PIECES, HUGGING_FACE)))
)
def test_bytes(data, folder):
    path = folder / "tokenizer.json"
    read(load_tokenizer, folder, path.name, data)
    read(load_piece_tokenizer, folder, path.name, data)
    read(read_tokenizer_json, folder, path.name, data, path, VOCABULARY)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"kind":' * 100_000, "9" * 10_000, "", "\ud800"])
def test_json_that_no_parser_likes(text, folder):
    read(load_tokenizer, folder, "tokenizer.json", text.encode("utf-8", "surrogatepass"))
    read(load_piece_tokenizer, folder, "tokenizer.json", text.encode("utf-8", "surrogatepass"))
