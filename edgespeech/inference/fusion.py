"""CTC prefix beam search on the host with a word language model (shallow fusion) and hot words.

    score(l) = log p_ctc(l) + lm_weight log p_lm(words of l) + word_bonus |words of l| + hot_bonus |hot words of l|

Shallow fusion: Gulcehre et al., arXiv 1503.03535. A word is scored when the next one starts, and the last one together
with the end of the text. While a hot word is being spelled, its bonus counts in part, so that it is not pruned before
it is complete (ours); what is returned counts whole words alone.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgespeech.errors import InputError
from edgespeech.inference.language_model import END, Context, NgramModel
from edgespeech.ops.ctc import BLANK

_IMPOSSIBLE = -math.inf


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Size of the beam and weights of what is added to the acoustic score; all values are ours.

    Attributes:
        beam_width: prefixes that are kept.
        lm_weight: of the language model's log probability (nats).
        word_bonus: nats a word, against a language model's liking for short texts.
        hot_words: words that are expected, spelled as the model writes them.
        hot_bonus: nats for each of them.
        least_log_prob: tokens below it in a frame start no new prefix; the most likely one always may.

    Raises:
        InputError: a value is out of range.
    """

    beam_width: int = 16
    lm_weight: float = 0.5
    word_bonus: float = 0.0
    hot_words: tuple[str, ...] = ()
    hot_bonus: float = 4.0
    least_log_prob: float = -9.0

    def __post_init__(self):
        if self.beam_width < 1:
            raise InputError(f"beam_width is {self.beam_width}: give at least 1")
        if self.lm_weight < 0:
            raise InputError(f"lm_weight is {self.lm_weight}: give 0 or more")
        for word in self.hot_words:
            if not word or word != "".join(word.split()):
                raise InputError(f"hot word {word!r} is not one word: give words without spaces")


class Hypothesis(NamedTuple):
    """A text and its scores in nats.

    Attributes:
        text: words with a space between them.
        tokens: labels.
        score: of everything.
        acoustic: `log p_ctc` alone.
    """

    text: str
    tokens: tuple[int, ...]
    score: float
    acoustic: float


class _Text(NamedTuple):
    """What a prefix says: finished words, the one being spelled, and the score of the finished ones."""

    words: tuple[str, ...]
    partial: str
    context: Context
    score: float


class FusionBeam:
    """Decodes one utterance at a time.

    Args:
        texts: of the tokens, from `words.token_texts`.
        config: see `FusionConfig`.
        model: language model, or None.
    """

    def __init__(self, texts: Sequence[str], config: FusionConfig, model: NgramModel | None = None):
        self._texts = texts
        self._config = config
        self._model = model
        self._usable = np.array([bool(text) for text in texts])
        self._usable[BLANK] = False
        # The share of a hot word's bonus that its beginnings have.
        self._shares: dict[str, float] = {}
        for word in config.hot_words:
            for size in range(1, len(word)):
                share = max(self._shares.get(word[:size], 0.0), size / len(word))
                self._shares[word[:size]] = share

    def __call__(self, log_probs: np.ndarray) -> list[Hypothesis]:
        """The best texts, best first.

        Args:
            log_probs: `[n v]`, normalised, valid frames alone.
        """
        start = _Text((), "", self._model.start if self._model else (), 0.0)
        said: dict[tuple[int, ...], _Text] = {(): start}
        beams = {
            (): (0.0, _IMPOSSIBLE)
        }  # log probability of alignments ending in blank, in a label
        for frame in np.asarray(log_probs, np.float64):
            grown: dict[tuple[int, ...], list[float]] = {}
            for prefix, (blank, label) in beams.items():
                total = np.logaddexp(blank, label)
                _add(grown, prefix, 0, total + frame[BLANK])
                if prefix:
                    _add(grown, prefix, 1, label + frame[prefix[-1]])
                for new in self._candidates(frame):
                    before = blank if prefix and new == prefix[-1] else total
                    if before == _IMPOSSIBLE:
                        continue
                    longer = (*prefix, new)
                    if longer not in said:
                        said[longer] = self._spell(said[prefix], self._texts[new])
                    _add(grown, longer, 1, before + frame[new])
            ranked = sorted(grown, key=lambda prefix: -self._rank(grown[prefix], said[prefix]))
            beams = {
                prefix: (grown[prefix][0], grown[prefix][1])
                for prefix in ranked[: self._config.beam_width]
            }
            said = {prefix: said[prefix] for prefix in beams}
        found = [
            self._finish(prefix, said[prefix], float(np.logaddexp(*parts)))
            for prefix, parts in beams.items()
        ]
        return sorted(found, key=lambda hypothesis: -hypothesis.score)

    def _candidates(self, frame: np.ndarray) -> list[int]:
        likely = frame >= self._config.least_log_prob
        likely[frame.argmax()] = True
        return np.flatnonzero(likely & self._usable).tolist()

    def _spell(self, text: _Text, added: str) -> _Text:
        """The text with one token more; a space in front of it ends the word before."""
        if added.startswith(" ") and text.partial:
            text = self._end_word(text)
        return text._replace(partial=text.partial + added.strip())

    def _end_word(self, text: _Text) -> _Text:
        word = text.partial
        score = text.score + self._config.word_bonus
        if word in self._config.hot_words:
            score += self._config.hot_bonus
        context = text.context
        if self._model is not None:
            score += self._config.lm_weight * self._model.log_prob(word, context)
            context = self._model.after(context, word)
        return _Text((*text.words, word), "", context, score)

    def _rank(self, parts: Sequence[float], text: _Text) -> float:
        share = 1.0 if text.partial in self._config.hot_words else 0.0
        share = max(share, self._shares.get(text.partial, 0.0))
        return float(np.logaddexp(parts[0], parts[1])) + text.score + self._config.hot_bonus * share

    def _finish(self, prefix: tuple[int, ...], text: _Text, acoustic: float) -> Hypothesis:
        if text.partial:
            text = self._end_word(text)
        score = acoustic + text.score
        if self._model is not None and END in self._model:
            score += self._config.lm_weight * self._model.log_prob(END, text.context)
        return Hypothesis(" ".join(text.words), prefix, score, acoustic)


def _add(grown: dict[tuple[int, ...], list[float]], prefix: tuple, ending: int, log_prob: float):
    parts = grown.setdefault(prefix, [_IMPOSSIBLE, _IMPOSSIBLE])
    parts[ending] = float(np.logaddexp(parts[ending], log_prob))
