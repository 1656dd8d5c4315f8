"""Recognisers on the same recordings: what each hears, how fast, how large it is and what memory it takes.

Each hears every recording alone, in a process of its own that is bound to so many cores.
"""

import functools
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from edgespeech.data.corpus import Corpus
from edgespeech.errors import InputError
from edgespeech.evaluation.bench_files import matching_int8
from edgespeech.evaluation.bench_peers import Peer
from edgespeech.evaluation.drawing import BLUE, ORANGE, label_at_right, new_figure, save_figure
from edgespeech.evaluation.latency import Prepare, limit_threads, peak_memory_mb
from edgespeech.evaluation.plain_text import plain_text
from edgespeech.evaluation.wer import WerResult, paired_bootstrap, score
from edgespeech.types import SAMPLE_RATE


class Recogniser(Protocol):
    """What is compared. Until it is loaded it can be sent to another process."""

    @property
    def name(self) -> str:
        """In the table."""
        ...

    @property
    def version(self) -> str:
        """Of the software."""
        ...

    @property
    def bits(self) -> int | None:
        """Of the weights; None where only the project knows."""
        ...

    @property
    def model_bytes(self) -> int:
        """Size of the model's files."""
        ...

    def load(self, threads: int) -> None:
        """Makes it ready; comes once, before the first recording."""
        ...

    def transcribe(self, samples: np.ndarray) -> str:
        """Text of a recording, float32 `[t]` in [-1, 1] at 16 kHz."""
        ...


class Recording(NamedTuple):
    """Something that was said.

    Attributes:
        id: of the utterance.
        samples: float32 `[t]` in [-1, 1] at 16 kHz.
        text: what was said; empty where nobody wrote it down.
    """

    id: str
    samples: np.ndarray
    text: str


def choose_recordings(
    corpus: Corpus, count: int, most_samples: int | None
) -> tuple[list[Recording], int]:
    """So many utterances, evenly spread over a corpus, and how many of it are too long to be among them.

    Args:
        corpus: in its order, which goes from speaker to speaker.
        count: at least 1; all are taken where there are fewer.
        most_samples: of an utterance; None: any.

    Raises:
        InputError: count is below 1, or every utterance is too long.
    """
    if count < 1:
        raise InputError(f"--utterances is {count}: give 1 or more")
    limit = np.inf if most_samples is None else most_samples
    short = [i for i, one in enumerate(corpus.utterances) if one.num_samples <= limit]
    if not short:
        raise InputError(
            f"all {len(corpus.utterances)} recordings are longer than {limit / SAMPLE_RATE:g} s, which is what an "
            "exported file takes: export with more --seconds"
        )
    places = np.unique(np.linspace(0, len(short) - 1, count).round().astype(int))
    chosen = [short[place] for place in places]
    recordings = [
        Recording(corpus.utterances[i].id, corpus.audio(i), corpus.utterances[i].text)
        for i in chosen
    ]
    return recordings, len(corpus.utterances) - len(short)


class Heard(NamedTuple):
    """What a recogniser made of recordings.

    Attributes:
        texts: of each.
        seconds: of computing, one row a turn, one column a recording.
    """

    texts: list[str]
    seconds: np.ndarray


def hear(
    recogniser: Recogniser,
    recordings: Sequence[Recording],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Heard:
    """Transcribes every recording so many times, after the first of them as a warm-up that does not count.

    Args:
        recogniser: loaded.
        recordings: at least one.
        repeats: turns through all of them.
        clock: seconds.
    """
    recogniser.transcribe(recordings[0].samples)
    texts: list[str] = []
    seconds = np.zeros((repeats, len(recordings)))
    for turn in range(repeats):
        texts = []
        for place, recording in enumerate(recordings):
            start = clock()
            texts.append(recogniser.transcribe(recording.samples))
            seconds[turn, place] = clock() - start
    return Heard(texts, seconds)


def measure_speech(
    recogniser: Recogniser, recordings: Sequence[Recording], threads: int, repeats: int
) -> dict[str, Any]:
    """The row of a recogniser: see `summarise`, with its peak memory, in processes of their own.

    Peak memory is what the longest recording, as the first, takes above the loaded model: see `peak_memory_mb`.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        heard = executor.submit(_hear_alone, recogniser, recordings, threads, repeats).result()
    longest = max(recordings, key=lambda recording: len(recording.samples)).samples[None]
    load = functools.partial(_load, recogniser, threads)
    row = summarise(recogniser, recordings, heard)
    return row | {"threads": threads, "peak_mb": peak_memory_mb(load, longest)}


def summarise(
    recogniser: Recogniser, recordings: Sequence[Recording], heard: Heard
) -> dict[str, Any]:
    """Name, size, times and errors of a recogniser.

    Percentiles are of the milliseconds of a recording; the real-time factor is all computing over all audio. WER is
    over the recordings whose text is known, both sides brought to the form of `plain_text`; None without any.
    """
    p50, p90, p99 = (float(ms) for ms in np.percentile(1e3 * heard.seconds, [50, 90, 99]))
    audio = len(heard.seconds) * sum(len(r.samples) for r in recordings) / SAMPLE_RATE
    result = _scored(recordings, heard.texts)
    return {
        "file": recogniser.name,
        "version": recogniser.version,
        "is_peer": isinstance(recogniser, Peer),
        "bits": recogniser.bits,
        "megabytes": recogniser.model_bytes / 1e6,
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "real_time_factor": float(heard.seconds.sum()) / audio,
        "score": result.to_json() if result else None,
        "texts": heard.texts,
    }


def _scored(recordings: Sequence[Recording], texts: Sequence[str]) -> WerResult | None:
    known = [
        (recording.id, plain_text(recording.text), plain_text(text))
        for recording, text in zip(recordings, texts, strict=True)
        if recording.text
    ]
    return score(*zip(*known, strict=True)) if known else None


def int8_against_float(
    rows: Sequence[Mapping[str, Any]], recordings: Sequence[Recording]
) -> list[dict[str, Any]]:
    """What 8 bits cost and save, for every file that is there in both forms and every number of threads.

    Args:
        rows: of `measure_speech`.
        recordings: that they heard.

    Returns:
        For each pair its name and threads, `wer` and `ci` (8 bits less 32, paired by utterance; None without
        transcripts), and 8 bits over 32: `size`, `time` (real-time factors), `memory`.
    """
    found = []
    for threads in dict.fromkeys(row["threads"] for row in rows):
        mine = [row for row in rows if row["threads"] == threads]
        for whole, small in matching_int8([(row["file"], row["bits"]) for row in mine]):
            a, b = mine[whole], mine[small]
            scores = [_scored(recordings, row["texts"]) for row in (a, b)]
            difference = None if None in scores else paired_bootstrap(*filter(None, scores))
            found.append(
                {
                    "file": b["file"],
                    "threads": threads,
                    "wer": difference and difference.difference,
                    "ci": difference and list(difference.ci),
                    "size": b["megabytes"] / a["megabytes"],
                    "time": b["real_time_factor"] / a["real_time_factor"],
                    "memory": b["peak_mb"] / a["peak_mb"] if a["peak_mb"] else None,
                }
            )
    return found


def _hear_alone(
    recogniser: Recogniser, recordings: Sequence[Recording], threads: int, repeats: int
) -> Heard:
    limit_threads(threads)
    recogniser.load(threads)
    return hear(recogniser, recordings, repeats)


def _load(recogniser: Recogniser, threads: int) -> Prepare:
    limit_threads(threads)
    recogniser.load(threads)

    def prepare(audio):
        def call():
            recogniser.transcribe(audio[0])

        return call

    return prepare


def wer_over_time(path: str | Path, rows: Sequence[Mapping[str, Any]], note: str) -> None:
    """Draws WER in percent with its 95 % interval over the real-time factor: left and low is better.

    Args:
        path: of the PNG.
        rows: of `measure_speech`.
        note: what was heard; it goes into the title.

    Raises:
        InputError: no row has a WER.
    """
    rows = [row for row in rows if row["score"] is not None]
    if not rows:
        raise InputError("no row has a WER: the plot needs recordings with transcripts")
    figure, axes = new_figure(1, 1, height=max(4.0, 0.17 * len(rows)))  # a line for each name
    axis = axes[0, 0]
    x = np.array([row["real_time_factor"] for row in rows])
    y = 100 * np.array([row["score"]["wer"] for row in rows])
    ends = 100 * np.array([row["score"]["ci"] for row in rows])
    for label, colour, is_peer in (("exported here", BLUE, False), ("peers", ORANGE, True)):
        mine = np.array([row["is_peer"] == is_peer for row in rows])
        if mine.any():
            bars = np.maximum(0, np.stack([y - ends[:, 0], ends[:, 1] - y]))[:, mine]
            axis.errorbar(
                x[mine], y[mine], bars, color=colour, ls="", marker="o", capsize=3, label=label
            )
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    threads = {row["threads"] for row in rows}
    names = [
        row["file"] + (f", {row['threads']} threads" if len(threads) > 1 else "") for row in rows
    ]
    label_at_right(axis, names, x, y)
    axis.set(xlabel="real-time factor", ylabel="WER, %")
    axis.grid(alpha=0.3)
    axis.legend(loc="best", fontsize=8)
    figure.suptitle(f"Word error rate over computing time, {note}")
    save_figure(figure, path)
