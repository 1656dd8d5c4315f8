"""Recordings joined by hand, and what is timed of them."""

import numpy as np
import pytest

from edgespeech.data.corpus import Corpus, Utterance
from edgespeech.errors import InputError
from edgespeech.evaluation import long_recordings
from edgespeech.evaluation.long_recordings import Joined, transcribe


class Counted(Corpus):
    """Utterances of constant samples: 100 times their row. Lengths in seconds by speaker, speakers interleaved."""

    kind, name = "folder", "test"

    def __init__(self, lengths):
        rows = [(s, i, n) for s, own in lengths.items() for i, n in enumerate(own)]
        rows.sort(key=lambda row: (row[1], row[0]))
        self.utterances = tuple(
            Utterance(f"{s}-1-{i:04d}", s, f"{s.upper()}{i} X", round(16_000 * n))
            for s, i, n in rows
        )

    def audio(self, index):
        return np.full(self.utterances[index].num_samples, 0.01 * index, np.float32)


def texts(joined):
    return {u.id: u.text for u in joined.utterances}


def test_successive_utterances_of_one_speaker():
    # b3 is longer than a recording; b has 1 s left at the end, which is too little.
    corpus = Counted({"a": [2, 1.5, 0.4, 3, 0.5], "b": [3, 1, 2, 9, 1.5, 0.8]})
    joined = Joined(corpus, 4)
    assert texts(joined) == {
        "a-4s-0000": "A0 X A1 X A2 X",
        "b-4s-0000": "B0 X B1 X",
        "a-4s-0001": "A3 X A4 X",
        "b-4s-0001": "B2 X B4 X",
    }
    rows = {u.id: row for row, u in enumerate(corpus.utterances)}
    for index, utterance in enumerate(joined.utterances):
        audio = joined.audio(index)
        assert len(audio) == utterance.num_samples <= 4 * 16_000
        assert audio.dtype == np.float32
        if utterance.id == "b-4s-0000":
            expected = [np.full(48_000, 0.01 * rows["b-1-0000"])]
            expected.append(np.full(16_000, 0.01 * rows["b-1-0001"]))
            np.testing.assert_array_equal(audio, np.concatenate(expected).astype(np.float32))


def test_minutes_are_shared_by_the_speakers():
    corpus = Counted({"a": [3.5] * 4, "b": [3.5] * 4, "c": [3.5] * 4})
    assert list(texts(Joined(corpus, 4, 4 * 3.5 / 60))) == [
        *("a-4s-0000", "b-4s-0000", "c-4s-0000", "a-4s-0001"),
    ]
    with pytest.raises(InputError, match="has a recording of 30 s within"):
        Joined(corpus, 30)
    with pytest.raises(InputError, match=r"within 0\.05 min"):
        Joined(corpus, 4, 0.05)


@pytest.mark.parametrize(("warm", "before"), [(1, [0]), (None, [0, 1, 2]), (2, [0, 1])])
def test_what_is_timed(monkeypatch, warm, before):
    """A clock that the transcriber itself moves on: only the second pass counts."""
    corpus = Counted({"a": [1.0], "b": [2.0], "c": [1.5]})
    now, seen = [0.0], []

    def text_of(audio):
        index = round(float(audio[0]) / 0.01)
        now[0] += 10.0 if index not in seen else 0.25  # compiling takes longer
        seen.append(index)
        return corpus.utterances[index].text.replace("X", "Y" if index == 2 else "x")

    monkeypatch.setattr(long_recordings.time, "perf_counter", lambda: now[0])
    done = transcribe(corpus, text_of, str.upper, warm=warm)
    assert seen == [*before, 0, 1, 2]
    assert done.seconds == 0.25 * len(before) + 10.0 * (3 - len(before))
    assert done.audio_seconds == 4.5
    assert (done.result.errors, done.result.words) == (1, 6)
