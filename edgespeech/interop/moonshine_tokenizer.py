"""Moonshine's tokenizer: byte-level BPE pieces of the Llama vocabulary and special tokens."""

import functools
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from edgespeech.data.corpus import write_atomically
from edgespeech.errors import InputError

FILE_NAME = "tokenizer.json"
# What JSON of other contents than expected leads to; OverflowError: an infinite number.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
SPACE = "▁"  # how a piece writes the space before a word


class PieceTokenizer:
    """Turns token ids into text and text into token ids.

    Args:
        pieces: the bytes of every token in the order of the ids; None for one that is no text, such as the end token.
        vocab_size: of the model; ids from `len(pieces)` on are no text either.

    Raises:
        InputError: there are more pieces than the vocabulary has tokens.
    """

    def __init__(self, pieces: Iterable[bytes | None], vocab_size: int):
        self.pieces = tuple(pieces)
        self.vocab_size = vocab_size
        if len(self.pieces) > vocab_size:
            raise InputError(
                f"the tokenizer has {len(self.pieces)} pieces and the model a vocabulary of {vocab_size}: take both "
                "from the same place"
            )
        # Bytes come first in the vocabulary: of a byte and a character that are spelled alike, text has the second.
        self._ids = {piece: i for i, piece in enumerate(self.pieces) if piece}
        self._encode_word = functools.cache(self._merge)

    def can_encode(self, text: str) -> set[str]:
        """The characters of the text that the vocabulary lacks; a text with words has a space before each."""
        written = {c: c.encode() for c in text if c != " "}
        if text.strip():
            written[" "] = SPACE.encode()
        return {
            c
            for c, piece in written.items()
            if piece not in self._ids and not all(bytes([b]) in self._ids for b in piece)
        }

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 `[u]`: the neighbours whose joint piece has the lowest id are merged first.

        Ids follow the order in which byte-pair encoding learned its pieces (Sennrich et al., 2016, arXiv 1508.07909).
        A character without a piece becomes its bytes.

        Raises:
            InputError: a character has neither.
        """
        if lacking := self.can_encode(text):
            raise InputError(
                f"cannot encode {text!r}: the vocabulary lacks {sorted(lacking)}; take them out"
            )
        ids = [i for word in text.split() for i in self._encode_word(SPACE + word)]
        return np.asarray(ids, np.int32)

    def _merge(self, word: str) -> tuple[int, ...]:
        parts = []
        for c in word:
            parts += [c.encode()] if c.encode() in self._ids else [bytes([b]) for b in c.encode()]
        while True:
            joint = [a + b for a, b in itertools.pairwise(parts)]
            known = [i for i, piece in enumerate(joint) if piece in self._ids]
            if not known:
                return tuple(self._ids[part] for part in parts)
            best = min(known, key=lambda i: self._ids[joint[i]])
            parts[best : best + 2] = [joint[best]]

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` into the folder, which is made when missing: a piece's bytes as Latin-1 text."""
        pieces = [None if piece is None else piece.decode("latin-1") for piece in self.pieces]
        description = {"kind": "pieces", "vocab_size": self.vocab_size, "pieces": pieces}
        text = json.dumps(description) + "\n"
        write_atomically(folder / FILE_NAME, lambda file: file.write(text.encode()))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, without white space at either end; bytes that are not UTF-8 become U+FFFD.

        Raises:
            InputError: an id is not in the vocabulary.
        """
        text = b""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise InputError(f"token {i} is not in the vocabulary of {self.vocab_size}")
            if i < len(self.pieces):
                text += self.pieces[i] or b""
        return text.decode("utf-8", errors="replace").replace(SPACE, " ").strip()


def load_piece_tokenizer(folder: Path) -> PieceTokenizer:
    """Reads what `PieceTokenizer.save` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pieces = [None if text is None else text.encode("latin-1") for text in content["pieces"]]
        vocab_size = content["vocab_size"]
        if type(vocab_size) is not int:
            raise ValueError(f"vocab_size {vocab_size!r}")
        return PieceTokenizer(pieces, vocab_size)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: name the folder that a model was saved to") from error
    except InputError:
        raise
    except (OSError, *MALFORMED) as error:
        raise InputError(f"{path} is damaged ({error!r}): save the model again") from error


def read_tokenizer_bin(path: Path, vocab_size: int, specials: Iterable[int]) -> PieceTokenizer:
    """Reads the `tokenizer.bin` of Moonshine's C++ library.

    The file is one piece after another, each its length and its bytes. A length is one byte below 128, or two: the
    low 7 bits with the top bit set, then the high bits.

    Args:
        path: of the file.
        vocab_size: of the model.
        specials: ids that are no text though the file spells them, such as those of `<s>` and `</s>`.

    Raises:
        InputError: the file is missing, cut short, or does not fit the model.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): name a tokenizer.bin") from error
    pieces: list[bytes | None] = []
    at = 0
    while at < len(data):
        length, at = data[at], at + 1
        if length >= 128 and at < len(data):
            length, at = length - 128 + 128 * data[at], at + 1
        if at + length > len(data):
            raise InputError(f"{path} ends inside piece {len(pieces)}: install the wheel again")
        pieces.append(data[at : at + length])
        at += length
    for i in specials:
        pieces[i : i + 1] = [None] * len(pieces[i : i + 1])
    return PieceTokenizer(pieces, vocab_size)


def read_tokenizer_json(path: Path, vocab_size: int) -> PieceTokenizer:
    """Reads the `tokenizer.json` of a Hugging Face Moonshine checkpoint.

    Args:
        path: of the file.
        vocab_size: of the model.

    Raises:
        InputError: the file is missing, damaged, or of another kind of tokenizer.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pieces: dict[int, bytes | None] = {
            int(i): _piece(token) for token, i in content["model"]["vocab"].items()
        }
        for token in content.get("added_tokens", []):
            pieces[int(token["id"])] = None if token["special"] else _piece(token["content"])
        # Before a list is made of them: one wrong number would fill the memory.
        if outside := [i for i in pieces if not 0 <= i < vocab_size]:
            raise InputError(
                f"{path} has a token {outside[0]} and the model a vocabulary of {vocab_size}: take both from the same "
                "place"
            )
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): name a tokenizer.json") from error
    except MALFORMED as error:
        raise InputError(
            f"{path} is not a BPE tokenizer of Hugging Face ({error!r}): take the one of the checkpoint"
        ) from error
    return PieceTokenizer((pieces.get(i) for i in range(max(pieces, default=-1) + 1)), vocab_size)


def _piece(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.encode("utf-8")
