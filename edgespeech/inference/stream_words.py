"""Words with times from the greedy CTC path of a stream, frame by frame."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from edgespeech.ops.ctc import BLANK

# A word of so many tokens is ended there: what never has a boundary would grow for ever.
MAX_WORD_TOKENS = 64


class TextOfIds(Protocol):
    """A tokenizer, as far as it is needed here."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...


class Word(NamedTuple):
    """A word of a stream.

    Attributes:
        text: without spaces.
        start: s from the start of the stream, at the first frame of its first token.
        end: s, after the last frame of its last token.
        stability: 1 for a final word. For the open one, the model's probability in the newest frame that its text
            does not go on: of the blank, or of a token that begins another word.
    """

    text: str
    start: float
    end: float
    stability: float


class Vocabulary:
    """What tokens mean for the limits of words.

    Args:
        tokenizer: whose `decode` shows by its spaces which tokens begin a word.
        size: tokens v, blank 0.

    Attributes:
        starts_word: bool `[v]`, tokens that end the word before them.
        has_text: bool `[v]`; the others, blank and space, are silence.
        ends_word: float32 `[v]`, 1 for tokens after which the open word has no more text.
    """

    def __init__(self, tokenizer: TextOfIds, size: int):
        def text(*tokens: int) -> str:
            return tokenizer.decode(tokens).strip()

        self.has_text = np.array([bool(text(token)) for token in range(size)])
        # Between two tokens of a word's middle, one that starts a word shows a space.
        middle = [t for t in np.flatnonzero(self.has_text).tolist() if " " not in text(t, t)][:1]
        self.starts_word = np.array(
            [not middle or " " in text(*middle, token, *middle) for token in range(size)]
        )
        self.has_text[BLANK] = False
        self.ends_word = self.starts_word.astype(np.float32)
        self.ends_word[BLANK] = 1.0
        self.tokenizer = tokenizer


class GreedyWords:
    """Collapses the greedy path of one stream into words: repeats merged, blanks removed.

    Greedy decoding never takes a token back, so a word is final once another begins, a space follows, or the speaker
    pauses.

    Args:
        vocabulary: of the path.
        frame_seconds: duration of a frame.
        endpoint_seconds: silence after a word that is a pause.

    Attributes:
        ended: a pause was found in the last `push`; it is reported once.
    """

    def __init__(self, vocabulary: Vocabulary, frame_seconds: float, endpoint_seconds: float):
        self.ended = False
        self._vocabulary = vocabulary
        self._frame_seconds = frame_seconds
        self._endpoint_seconds = endpoint_seconds
        self._frame = 0
        self._previous = BLANK
        self._open: list[int] = []  # tokens with text of the open word
        self._first = 0  # its first frame
        self._last = 0  # the last frame of its last token
        self._stability = 0.0
        self._is_speaking = False

    def push(self, path: np.ndarray, certainty: np.ndarray) -> list[Word]:
        """Takes the next frames; returns the words that they make final.

        Args:
            path: int `[n]`, the most likely token of each frame.
            certainty: float `[n]`, the probability in each frame that the open word does not go on.
        """
        final: list[Word] = []
        self.ended = False
        for token, stability in zip(path.tolist(), certainty.tolist(), strict=True):
            self._stability = stability
            is_new, self._previous = token != self._previous, token
            if is_new and (
                self._vocabulary.starts_word[token] or len(self._open) == MAX_WORD_TOKENS
            ):
                final += self.end()
            if self._vocabulary.has_text[token]:
                if is_new:
                    if not self._open:
                        self._first = self._frame
                    self._open.append(token)
                self._last = self._frame
                self._is_speaking = True
            self._frame += 1
            silence = (self._frame - 1 - self._last) * self._frame_seconds
            # Half a frame for the rounding of the product.
            if self._is_speaking and silence > self._endpoint_seconds - self._frame_seconds / 2:
                final += self.end()
                self.ended, self._is_speaking = True, False
        return final

    def partial(self) -> Word | None:
        """The open word as far as it is known."""
        return self._word(self._stability)

    def end(self) -> list[Word]:
        """Makes the open word final, if there is one."""
        word = self._word(1.0)
        self._open = []
        return [] if word is None else [word]

    def _word(self, stability: float) -> Word | None:
        text = self._vocabulary.tokenizer.decode(self._open).strip()
        if not text:
            return None
        start, end = self._first * self._frame_seconds, (self._last + 1) * self._frame_seconds
        return Word(text, start, end, stability)
