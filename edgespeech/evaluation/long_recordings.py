"""Long recordings made of utterances, and what it takes to transcribe them: word errors and seconds."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from edgespeech.data.corpus import Corpus, Utterance
from edgespeech.errors import InputError
from edgespeech.evaluation.wer import WerResult, score
from edgespeech.types import SAMPLE_RATE

LEAST_SHARE = (
    0.75  # of the seconds asked for: what is left of a speaker and shorter is no such recording
)


class Joined(Corpus):
    """Recordings of about so many seconds, each of successive utterances of one speaker, with their texts joined.

    A recording takes the next utterance as long as both fit; what a speaker has left is dropped below `LEAST_SHARE`.
    Nothing is put in between. The steps in background noise at the joints are what no single recording has. Ours.

    Args:
        corpus: the utterances; those longer than a recording are left out.
        seconds: length of a recording at most.
        most_minutes: of recordings in all, taken from the speakers in turn.

    Raises:
        InputError: no speaker has enough audio.
    """

    def __init__(self, corpus: Corpus, seconds: float, most_minutes: float = float("inf")):
        self.kind, self.name, self.notes = corpus.kind, f"{corpus.name}-{seconds:g}s", corpus.notes
        self.skipped = corpus.skipped
        self._corpus = corpus
        limit = round(seconds * SAMPLE_RATE)
        parts: dict[str, list[list[int]]] = defaultdict(list)
        samples = [u.num_samples for u in corpus.utterances]
        filled: dict[str, int] = {}
        for row, utterance in enumerate(corpus.utterances):
            speaker = utterance.speaker
            if samples[row] > limit:
                continue
            if speaker not in filled or filled[speaker] + samples[row] > limit:
                parts[speaker].append([])
                filled[speaker] = 0
            parts[speaker][-1].append(row)
            filled[speaker] += samples[row]
        self._rows: list[list[int]] = []
        utterances: list[Utterance] = []
        total = 0
        for speaker, number, rows in _in_turn(parts):
            length = sum(samples[row] for row in rows)
            if length < LEAST_SHARE * limit or total + length > most_minutes * 60 * SAMPLE_RATE:
                continue
            total += length
            text = " ".join(corpus.utterances[row].text for row in rows)
            utterances.append(
                Utterance(f"{speaker}-{seconds:g}s-{number:04d}", speaker, text, length)
            )
            self._rows.append(rows)
        if not utterances:
            raise InputError(
                f"no speaker of {corpus.name!r} has a recording of {seconds:g} s within {most_minutes:g} min: "
                "ask for shorter ones, or more minutes"
            )
        self.utterances = tuple(utterances)

    def audio(self, index: int) -> np.ndarray:
        """See `Corpus`."""
        return np.concatenate([self._corpus.audio(row) for row in self._rows[index]])


def _in_turn(parts: dict[str, list[list[int]]]):
    """(speaker, number, rows): the first recording of every speaker, then the second of every one, and so on."""
    for number in range(max(map(len, parts.values()), default=0)):
        for speaker, own in parts.items():
            if number < len(own):
                yield speaker, number, own[number]


class Transcribed(NamedTuple):
    """What came of it.

    Attributes:
        result: word errors.
        seconds: of compute, compilation not counted, of all recordings together.
        audio_seconds: of all recordings.
    """

    result: WerResult
    seconds: float
    audio_seconds: float


def transcribe(
    corpus: Corpus,
    text_of: Callable[[np.ndarray], str],
    compared: Callable[[str], str] = lambda text: text,
    warm: int | None = 1,
) -> Transcribed:
    """Word errors and time, one recording after the other.

    Args:
        corpus: the recordings.
        text_of: float32 `[t]` at 16 kHz to its text.
        compared: the form in which reference and hypothesis are compared.
        warm: so many recordings are transcribed once more before the clock starts, for what they compile: the first,
            where all make one program; None: all of them.
    """
    for index in range(len(corpus))[:warm]:
        text_of(corpus.audio(index))
    heard, seconds = [], 0.0
    for index in range(len(corpus)):
        audio = corpus.audio(index)
        start = time.perf_counter()
        heard.append(text_of(audio))
        seconds += time.perf_counter() - start
    utterances: Sequence[Utterance] = corpus.utterances
    result = score(
        [u.id for u in utterances],
        [compared(u.text) for u in utterances],
        [compared(text) for text in heard],
    )
    return Transcribed(result, seconds, sum(u.num_samples for u in utterances) / SAMPLE_RATE)
