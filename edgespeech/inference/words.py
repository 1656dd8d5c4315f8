"""From a CTC path to words with their times."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from edgespeech.errors import InputError
from edgespeech.ops.ctc import BLANK


class TextTokenizer(Protocol):
    """A tokenizer, as far as it is needed here."""

    vocab_size: int

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids."""
        ...


class Word(NamedTuple):
    """A word and its time.

    Attributes:
        text: without spaces.
        start: s from the start of the recording or stream, at the first frame of its first token.
        end: s, after the last labelled frame of its last token.
        stability: 1 for a final word. For the open one of a stream, the model's probability in the newest frame that
            its text does not go on: of the blank, or of a token that begins another word.
    """

    text: str
    start: float
    end: float
    stability: float = 1.0


def token_texts(tokenizer: TextTokenizer) -> tuple[str, ...]:
    """What each token adds to a text: a space where it starts a word, nothing for the blank and other special tokens.

    It is read off `decode`: the token between two copies of one that stands inside a word.

    Raises:
        InputError: every token starts a word.
    """
    decode = tokenizer.decode
    ids = range(tokenizer.vocab_size)
    inside = next((i for i in ids if decode([i]) and decode([i, i]) == 2 * decode([i])), None)
    if inside is None:
        raise InputError(
            f"none of the {tokenizer.vocab_size} tokens can stand inside a word: word times need characters or "
            "SentencePiece units"
        )
    around = len(decode([inside]))
    return tuple(decode([inside, i, inside])[around:-around] for i in ids)


def words_of_path(
    path: Sequence[int] | np.ndarray, texts: Sequence[str], frame_seconds: float
) -> list[Word]:
    """Words of a CTC path, the most likely alignment: each from its first to the end of its last labelled frame.

    CTC labels a frame or two of a token and leaves the others blank, so a word may end later than is said here, by at
    most the blanks that follow it.

    Args:
        path: label of every frame, blanks and repeats in it.
        texts: of the tokens, from `token_texts`.
        frame_seconds: frame i is the time from i to i + 1 times this.
    """
    words: list[Word] = []
    begins = True  # whether the next text starts a word
    previous = BLANK
    for frame, label in enumerate(map(int, path)):
        text = texts[label]
        end = (frame + 1) * frame_seconds
        if label != previous and label != BLANK:
            begins = begins or text.startswith(" ")
            if text.strip() and begins:
                words.append(Word(text.strip(), frame * frame_seconds, end))
                begins = False
            elif text.strip():
                words[-1] = Word(words[-1].text + text, words[-1].start, end)
        elif label != BLANK and text.strip():
            words[-1] = words[-1]._replace(end=end)
        previous = label
    return words


def text_of(words: Iterable[Word]) -> str:
    """The words with a space between them."""
    return " ".join(word.text for word in words)


def word_facts(words: Iterable[Word]) -> list[dict[str, Any]]:
    """Words for JSON: text, start and end in seconds."""
    return [
        {"word": word.text, "start": round(word.start, 3), "end": round(word.end, 3)}
        for word in words
    ]
