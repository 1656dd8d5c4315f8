"""Moonshine's tokenizer from both of its file forms."""

import json

import pytest

from edgespeech.errors import InputError
from edgespeech.interop.moonshine_tokenizer import read_tokenizer_bin, read_tokenizer_json

LONG = "▁" + "a" * 200
PIECES = ["<unk>", "<s>", "</s>", b"\xc3", b"\xa9", "▁the", "▁caf", "re", LONG]


def write_bin(path):
    data = b""
    for piece in PIECES:
        piece = piece.encode() if isinstance(piece, str) else piece
        n = len(piece)
        data += (bytes([n]) if n < 128 else bytes([128 + n % 128, n // 128])) + piece
    path.write_bytes(data)
    return path


def write_json(path, **changes):
    tokens = [f"<0x{p.hex().upper()}>" if isinstance(p, bytes) else p for p in PIECES]
    special = [{"id": i, "content": tokens[i], "special": True} for i in range(3)]
    added = [*special, {"id": 9, "content": "<<ST_0>>", "special": True}]
    vocab = {token: i for i, token in enumerate(tokens)}
    content = {"model": {"type": "BPE", "vocab": vocab}, "added_tokens": added, **changes}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(params=["bin", "json"])
def tokenizer(request, tmp_path):
    if request.param == "bin":
        return read_tokenizer_bin(write_bin(tmp_path / "tokenizer.bin"), 11, (0, 1, 2))
    return read_tokenizer_json(write_json(tmp_path / "tokenizer.json"), 11)


def test_decode(tokenizer):
    assert tokenizer.decode([1, 5, 6, 3, 4, 2]) == "the café"
    assert tokenizer.decode([5, 7, 8]) == "there " + "a" * 200
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([0, 1, 9, 10, 5]) == "the"  # special, and beyond the pieces
    assert tokenizer.decode([3, 5]) == "\ufffd the"
    with pytest.raises(InputError, match="token 11 is not in the vocabulary of 11"):
        tokenizer.decode([11])


def test_files_that_cannot_be_used(tmp_path):
    path = write_bin(tmp_path / "tokenizer.bin")
    with pytest.raises(InputError, match="9 pieces and the model a vocabulary of 8"):
        read_tokenizer_bin(path, 8, ())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="ends inside piece 8"):
        read_tokenizer_bin(path, 11, ())
    with pytest.raises(InputError, match="cannot be read"):
        read_tokenizer_bin(tmp_path / "no.bin", 11, ())
    with pytest.raises(InputError, match="cannot be read"):
        read_tokenizer_json(tmp_path / "no.json", 11)
    for changes in ({"model": {}}, {"model": {"vocab": ["a"]}}, {"added_tokens": [{"id": 1}]}):
        with pytest.raises(InputError, match="not a BPE tokenizer"):
            read_tokenizer_json(write_json(tmp_path / "tokenizer.json", **changes), 11)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="not a BPE tokenizer"):
        read_tokenizer_json(tmp_path / "tokenizer.json", 11)
