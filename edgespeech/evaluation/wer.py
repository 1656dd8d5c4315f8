"""Word error rate with a bootstrap confidence interval, and the paired comparison of two systems.

    WER = (substitutions + deletions + insertions) / reference words

summed over the test set, by minimum edit distance. The intervals are percentile bootstraps over
utterances (Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance
evaluation", ICASSP 2004). They treat utterances as independent: with few speakers they are too
narrow.

Rates are fractions (0.034 is 3.4 %) and can exceed 1. Text is compared as it is given, apart from
white space: the caller brings references and hypotheses to one case and punctuation.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jiwer
import numpy as np

from edgespeech.errors import InputError

RESAMPLES = 10_000
CONFIDENCE = 0.95
_SEED = 0
_BLOCK = 2**21  # utterance draws held in memory at once: 16 MiB of indices


class WordErrors(NamedTuple):
    """Edit operations that turn the hypothesis of one utterance into its reference, in words."""

    id: str
    reference: str
    hypothesis: str
    substitutions: int
    deletions: int
    insertions: int
    words: int  # of the reference

    @property
    def errors(self) -> int:
        """Substitutions + deletions + insertions: the edit distance in words."""
        return self.substitutions + self.deletions + self.insertions


@dataclass(frozen=True)
class WerResult:
    """Score of one system on one test set.

    wer: errors / words, a fraction. ci: its 95 % interval (low, high). cer: the same ratio over
    characters, spaces between words included. utterances: one row each, in the order given.
    """

    wer: float
    errors: int
    words: int
    ci: tuple[float, float]
    cer: float
    utterances: tuple[WordErrors, ...]

    def to_json(self) -> dict:
        """Give the totals as a dict of plain Python values, without the utterances."""
        return {
            "wer": self.wer,
            "ci": list(self.ci),
            "cer": self.cer,
            "errors": self.errors,
            "substitutions": sum(row.substitutions for row in self.utterances),
            "deletions": sum(row.deletions for row in self.utterances),
            "insertions": sum(row.insertions for row in self.utterances),
            "words": self.words,
            "utterances": len(self.utterances),
        }

    def write_hypotheses(self, path: str | Path) -> None:
        """Write one JSON line per utterance: id, reference, hypothesis, errors, words."""
        with Path(path).open("w", encoding="utf-8") as file:
            for row in self.utterances:
                line = {
                    "id": row.id,
                    "reference": row.reference,
                    "hypothesis": row.hypothesis,
                    "errors": row.errors,
                    "words": row.words,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


class WerDifference(NamedTuple):
    """WER(b) - WER(a), a fraction, with its 95 % interval (low, high). Above 0, b is worse."""

    difference: float
    ci: tuple[float, float]


def score(ids: Sequence[str], references: Sequence[str], hypotheses: Sequence[str]) -> WerResult:
    """Score hypotheses against references, item by item.

    An empty hypothesis counts as deletions only, an empty reference as insertions only (it adds
    errors and no words).

    Raises:
        InputError: the three sequences differ in length, an id comes twice, or no reference has a
            word, so that the rate is undefined.
    """
    if not len(ids) == len(references) == len(hypotheses):
        raise InputError(
            f"{len(ids)} ids, {len(references)} references and {len(hypotheses)} hypotheses: "
            "give one of each per utterance"
        )
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))
        raise InputError(f"utterance id {twice!r} comes twice: score every utterance once")
    references = [" ".join(text.split()) for text in references]
    hypotheses = [" ".join(text.split()) for text in hypotheses]
    if not any(references):
        raise InputError(
            f"none of the {len(ids)} references has a word, so WER is undefined: "
            "check that the transcripts were read"
        )

    alignments = jiwer.process_words(references, hypotheses).alignments
    rows = tuple(
        _count(*utterance)
        for utterance in zip(ids, references, hypotheses, alignments, strict=True)
    )
    errors = np.array([row.errors for row in rows])
    words = np.array([row.words for row in rows])
    return WerResult(
        wer=int(errors.sum()) / int(words.sum()),
        errors=int(errors.sum()),
        words=int(words.sum()),
        ci=bootstrap_interval(errors, words),
        cer=jiwer.process_characters(references, hypotheses).cer,
        utterances=rows,
    )


def paired_bootstrap(result_a: WerResult, result_b: WerResult) -> WerDifference:
    """Compare two systems on the same utterances: WER(b) - WER(a) with its 95 % interval.

    Both systems are resampled together, so what makes an utterance hard for both cancels and the
    interval is narrower than that of two separate scores. Rows are matched by id, in any order.

    Raises:
        InputError: the two results do not cover the same utterances with the same references.
    """
    rows_b = {row.id: row for row in result_b.utterances}
    ids_a = {row.id for row in result_a.utterances}
    if unmatched := sorted(ids_a ^ rows_b.keys()):
        raise InputError(
            f"{len(unmatched)} utterances are in one result only, such as {unmatched[0]!r}: "
            "score both systems on the same set"
        )
    for row in result_a.utterances:
        if row.reference != rows_b[row.id].reference:
            raise InputError(
                f"utterance {row.id!r} has two references, {row.reference!r} and "
                f"{rows_b[row.id].reference!r}: score both systems on the same transcripts"
            )
    words = np.array([row.words for row in result_a.utterances])
    extra = np.array([rows_b[row.id].errors - row.errors for row in result_a.utterances])
    return WerDifference(int(extra.sum()) / int(words.sum()), bootstrap_interval(extra, words))


def _count(utterance: str, reference: str, hypothesis: str, chunks) -> WordErrors:
    counts = {"equal": 0, "substitute": 0, "delete": 0, "insert": 0}
    for chunk in chunks:
        # One of the two spans is empty in an insertion or a deletion.
        span_reference = chunk.ref_end_idx - chunk.ref_start_idx
        span_hypothesis = chunk.hyp_end_idx - chunk.hyp_start_idx
        counts[chunk.type] += max(span_reference, span_hypothesis)
    return WordErrors(
        id=utterance,
        reference=reference,
        hypothesis=hypothesis,
        substitutions=counts["substitute"],
        deletions=counts["delete"],
        insertions=counts["insert"],
        words=len(reference.split()),
    )


def bootstrap_interval(errors: np.ndarray, words: np.ndarray) -> tuple[float, float]:
    """Percentile interval of sum(errors) / sum(words) over utterances drawn with replacement."""
    rng = np.random.default_rng(_SEED)
    size = len(words)
    block = max(1, _BLOCK // size)
    ratios = []
    for first in range(0, RESAMPLES, block):
        drawn = rng.integers(0, size, (min(block, RESAMPLES - first), size))
        total = words[drawn].sum(axis=1)
        # A draw of nothing but empty references has no rate.
        ratios.append(errors[drawn].sum(axis=1)[total > 0] / total[total > 0])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return float(low), float(high)
