"""Text to token ids and back, for CTC: characters, or SentencePiece units."""

import base64
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from edgespeech.errors import InputError

BLANK = "<pad>"
SPACE = "|"
FILE_NAME = "tokenizer.json"


class Tokenizer(ABC):
    """What every tokenizer has; `vocab_size` counts the blank, `blank_id` is its id."""

    vocab_size: int
    blank_id: int
    _characters: set[str]

    def can_encode(self, text: str) -> set[str]:
        """The characters of the text that the vocabulary lacks: none when it can be encoded."""
        return set(text) - self._characters

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: Iterable[int]) -> str: ...

    @abstractmethod
    def _description(self) -> dict: ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text: int32 `[u]`, never a blank.

        Raises:
            InputError: characters that the vocabulary lacks, which are named.
        """
        unknown = self.can_encode(text)
        if unknown:
            raise InputError(
                f"cannot encode {text!r}: the vocabulary lacks {sorted(unknown)}; "
                "the fix: normalise the text (upper case, no digits, no punctuation), "
                "or use another tokenizer"
            )
        return np.asarray(self._encode(text), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, after `ctc_collapse`: special tokens vanish, spaces are single."""
        return " ".join(self._decode(ids).split())

    def save(self, folder: str | os.PathLike) -> None:
        """Write `tokenizer.json` into the folder, which is made when missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._description(), ensure_ascii=False, indent=1)
        (Path(folder) / FILE_NAME).write_text(text + "\n", encoding="utf-8")


class CharTokenizer(Tokenizer):
    """One token a character; by default blank 0, space "|" 1, apostrophe 2, A-Z 3 to 28.

    Args:
        vocabulary: tokens in the order of their ids, or a mapping token -> id as in the vocab.json
            of Hugging Face wav2vec2. Tokens longer than one character are special and never encode
            text.

    Raises:
        InputError: the blank "<pad>" or the space "|" is missing, ids are not 0..v-1, or a token
            occurs twice.
    """

    def __init__(self, vocabulary: Sequence[str] | Mapping[str, int] | None = None):
        if vocabulary is None:
            vocabulary = [BLANK, SPACE, "'", *ascii_uppercase]
        if isinstance(vocabulary, Mapping):
            by_id = {index: token for token, index in vocabulary.items()}
            if sorted(by_id) != list(range(len(vocabulary))):
                raise InputError(
                    f"the vocabulary's ids must be 0 to {len(vocabulary) - 1}, each once; "
                    "the fix: renumber them"
                )
            vocabulary = [by_id[index] for index in range(len(by_id))]
        self.vocabulary = tuple(vocabulary)
        self._ids = {token: index for index, token in enumerate(self.vocabulary)}
        if len(self._ids) != len(self.vocabulary):
            raise InputError("the vocabulary names a token twice; the fix: name each token once")
        missing = {BLANK, SPACE} - set(self.vocabulary)
        if missing:
            raise InputError(
                f"the vocabulary of {len(self.vocabulary)} tokens lacks {sorted(missing)}; "
                f"the fix: add {BLANK!r} for the blank and {SPACE!r} for the space"
            )
        self.vocab_size = len(self.vocabulary)
        self.blank_id = self._ids[BLANK]
        self._characters = {token for token in self.vocabulary if len(token) == 1} - {SPACE} | {" "}

    def _encode(self, text: str) -> list[int]:
        return [self._ids[SPACE if character == " " else character] for character in text]

    def _decode(self, ids: Iterable[int]) -> str:
        tokens = (self.vocabulary[int(index)] for index in ids)
        return "".join(token for token in tokens if len(token) == 1).replace(SPACE, " ")

    def _description(self) -> dict:
        return {"kind": "char", "vocabulary": list(self.vocabulary)}


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece units (Kudo and Richardson 2018): the blank is 0, the unknown token 1.

    Args:
        model: a serialised SentencePiece model with pad_id 0 and unk_id 1, as `train` makes it.

    Raises:
        InputError: not such a model.
    """

    def __init__(self, model: bytes):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"not a SentencePiece model ({len(model)} bytes): {error}; "
                "the fix: train the tokenizer again"
            ) from error
        if (self._processor.pad_id(), self._processor.unk_id()) != (0, 1):
            raise InputError(
                f"the SentencePiece model has pad_id {self._processor.pad_id()} and unk_id "
                f"{self._processor.unk_id()}, needed are 0 (the blank) and 1; "
                "the fix: use SentencePieceTokenizer.train"
            )
        self._model = model
        self.vocab_size = self._processor.vocab_size()
        self.blank_id = 0
        pieces = [self._processor.id_to_piece(index) for index in range(self.vocab_size)]
        self._characters = {piece for piece in pieces if len(piece) == 1} | {" "}

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, model_type: str = "bpe"
    ) -> "SentencePieceTokenizer":
        """Learn the units from texts; the same texts give the same units.

        Args:
            texts: sentences; every character in them becomes a unit.
            vocab_size: units in all, with the blank and the unknown token.
            model_type: "bpe" or "unigram".

        Raises:
            InputError: no text, an unknown model type, or a vocabulary size that the texts cannot
                give.
        """
        import sentencepiece

        if model_type not in ("bpe", "unigram"):
            raise InputError(f"model_type is {model_type!r}; the fix: use 'bpe' or 'unigram'")
        sentences = [text for text in texts if text.strip()]
        if not sentences:
            raise InputError("no text to train a tokenizer on; the fix: give at least one sentence")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                character_coverage=1.0,
                normalization_rule_name="identity",
                split_by_unicode_script=False,  # else the apostrophe would cut DON'T in three
                shuffle_input_sentence=False,
                num_threads=1,
                pad_id=0,
                pad_piece=BLANK,
                unk_id=1,
                bos_id=-1,
                eos_id=-1,
                minloglevel=2,
            )
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"vocab_size {vocab_size} does not fit the {len(sentences)} texts: {error}; "
                "the fix: choose a size that the message allows, or give more text"
            ) from error
        return cls(model.getvalue())

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(index) for index in ids if index > 1])

    def _description(self) -> dict:
        return {"kind": "sentencepiece", "model": base64.b64encode(self._model).decode("ascii")}


def load_tokenizer(folder: str | os.PathLike) -> CharTokenizer | SentencePieceTokenizer:
    """Read what `save` wrote. The file holds data only: nothing in it is executed.

    Raises:
        InputError: the file is missing, is not such JSON, or names an unknown kind.
    """
    path = Path(folder) / FILE_NAME
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        kind = description["kind"]
        if kind == "char":
            return CharTokenizer(description["vocabulary"])
        if kind == "sentencepiece":
            return SentencePieceTokenizer(base64.b64decode(description["model"], validate=True))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing; the fix: name the folder that a tokenizer was saved to"
        ) from error
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({error!r}); the fix: save the tokenizer again"
        ) from error
    raise InputError(f"{path} names the kind {kind!r}; known are 'char' and 'sentencepiece'")


def ctc_collapse(ids: Iterable[int], blank: int = 0) -> list[int]:
    """The labels of a CTC path: repeats merged, then blanks removed (Graves et al. 2006, 3.1)."""
    labels: list[int] = []
    previous = None
    for index in (int(i) for i in ids):
        if index not in (previous, blank):
            labels.append(index)
        previous = index
    return labels


def min_frames(tokens: Sequence[int] | np.ndarray) -> int:
    """The fewest frames CTC can align to: one a token, one blank between equal neighbours."""
    tokens = np.asarray(tokens)
    return len(tokens) + int(np.count_nonzero(tokens[1:] == tokens[:-1]))
