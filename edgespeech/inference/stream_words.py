"""Words with times from the greedy CTC path of a stream, frame by frame."""

from collections.abc import Sequence

import numpy as np

from edgespeech.inference.words import Word
from edgespeech.ops.ctc import BLANK
from edgespeech.types import Float

# A word of so many tokens is ended there: what never has a boundary would grow for ever.
MAX_WORD_TOKENS = 64


def ends_word(texts: Sequence[str]) -> Float[np.ndarray, "v"]:
    """1 for the tokens after which an open word has no more text: the blank and those that start a word.

    Args:
        texts: of the tokens, from `token_texts`.
    """
    ends = np.array([text.startswith(" ") for text in texts], np.float32)
    ends[BLANK] = 1.0
    return ends


class GreedyWords:
    """Collapses the greedy path of one stream into words: repeats merged, blanks removed.

    Greedy decoding never takes a token back, so a word is final once another begins, a space follows, or the speaker
    pauses.

    Args:
        texts: of the tokens, from `token_texts`.
        frame_seconds: duration of a frame.
        endpoint_seconds: silence after a word that is a pause.

    Attributes:
        ended: a pause was found in the last `push`; it is reported once.
    """

    def __init__(self, texts: Sequence[str], frame_seconds: float, endpoint_seconds: float):
        self.ended = False
        self._texts = texts
        self._frame_seconds = frame_seconds
        self._endpoint_seconds = endpoint_seconds
        self._frame = 0
        self._previous = BLANK
        self._open = ""  # text of the open word
        self._num_open = 0  # tokens with text in it
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
            text = self._texts[int(token)] if token != BLANK else ""
            if is_new and (text.startswith(" ") or self._num_open == MAX_WORD_TOKENS):
                final += self.end()
            if text.strip():
                if is_new:
                    if not self._num_open:
                        self._first = self._frame
                    self._open += text
                    self._num_open += 1
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
        self._open, self._num_open = "", 0
        return [] if word is None else [word]

    def _word(self, stability: float) -> Word | None:
        if not self._num_open:
            return None
        start, end = self._first * self._frame_seconds, (self._last + 1) * self._frame_seconds
        return Word(self._open.strip(), start, end, stability)
