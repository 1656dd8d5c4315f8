"""Targets for the student of an encoder-decoder: what its teacher hears, which needs no transcripts, or transcripts."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from edgespeech.data.batching import BatchConfig, BatchSource, TextEncoder
from edgespeech.data.corpus import Corpus, Skipped, subset
from edgespeech.errors import InputError
from edgespeech.evaluation.decode import Seq2SeqDecoder, TokenText
from edgespeech.types import SAMPLE_RATE


class TokenIds:
    """Reads texts that are token ids already, written as decimal numbers: those of `Labelled`."""

    def can_encode(self, text: str) -> set[str]:
        """The characters of the text that are not part of such numbers."""
        return set(text) - set("0123456789 ")

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 `[u]`."""
        return np.asarray(text.split(), np.int32)


class Labelled(Corpus):
    """The audio of a corpus with token ids for texts, to be read by `TokenIds`; what has none is left out.

    Args:
        corpus: the audio.
        tokens: the token ids of an utterance by its id.
        skipped: what was left out because it has none.

    Raises:
        InputError: nothing is left.
    """

    def __init__(self, corpus: Corpus, tokens: Mapping[str, list[int]], skipped: list[Skipped]):
        rows = [i for i, u in enumerate(corpus.utterances) if u.id in tokens]
        if not rows:
            first = f"; the first, {skipped[0].id}: {skipped[0].reason}" if skipped else ""
            raise InputError(
                f"no utterance of {corpus.name!r} has a label{first}; train on other audio"
            )
        self._corpus = subset(corpus, rows)
        self.kind, self.name, self.notes = corpus.kind, corpus.name, corpus.notes
        self.skipped = (*corpus.skipped, *skipped)
        self.utterances = tuple(
            dataclasses.replace(u, text=" ".join(map(str, tokens[u.id])))
            for u in self._corpus.utterances
        )

    def audio(self, index: int) -> np.ndarray:
        """See `Corpus`."""
        return self._corpus.audio(index)


def teacher_texts(
    path: Path, decoder: Seq2SeqDecoder, state: nnx.State, corpus: Corpus, config: BatchConfig
) -> dict[str, TokenText]:
    """The teacher's greedy text of every utterance by its id, each worked out once.

    Args:
        path: a file of JSON lines `{"id", "tokens", "ended"}`, which grows batch by batch; what is in it is not worked
            out again, so that a run that was stopped goes on where it was.
        decoder: of the teacher's structure.
        state: the teacher's.
        corpus: the audio; its texts are not looked at.
        config: of the batches; their order and a change of speed have no part in it. Longer utterances than its
            `max_seconds` get no text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _read(path)
    todo = [
        i
        for i, u in enumerate(corpus.utterances)
        if u.id not in known and u.num_samples <= config.max_seconds * SAMPLE_RATE
    ]
    if not todo:
        return known
    source = BatchSource(
        subset(corpus, todo), None, dataclasses.replace(config, speed_factors=(1.0,))
    )
    with path.open("a", encoding="utf-8") as file:
        for id, text in _decode(decoder, state, source):
            known[id] = text
            row = {"id": id, "tokens": text.tokens, "ended": text.ended}
            file.write(json.dumps(row) + "\n")
            file.flush()
    return known


def label_with_teacher(corpus: Corpus, texts: Mapping[str, TokenText]) -> Labelled:
    """The corpus with the teacher's texts; one that was cut off is a teacher that repeats itself, and is left out."""
    usable, skipped = {}, []
    for u in corpus.utterances:
        if u.id not in texts:
            seconds = u.num_samples / SAMPLE_RATE
            skipped.append(Skipped(u.id, f"{seconds:.1f} s is above max_seconds"))
        elif not texts[u.id].ended:
            skipped.append(Skipped(u.id, "the teacher's text does not end"))
        else:
            usable[u.id] = texts[u.id].tokens
    return Labelled(corpus, usable, skipped)


def label_with_transcripts(corpus: Corpus, tokenizer: TextEncoder) -> Labelled:
    """The corpus with the tokens of its own texts in lower case: a transcript in capitals has no case to keep."""
    tokens = {u.id: tokenizer.encode(u.text.lower()).tolist() for u in corpus.utterances}
    return Labelled(corpus, tokens, [])


def _decode(
    decoder: Seq2SeqDecoder, state: nnx.State, source: BatchSource
) -> Iterator[tuple[str, TokenText]]:
    for batch in source.eval_batches():
        for row, text in zip(batch.index, decoder.token_texts(state, batch), strict=True):
            if row >= 0:
                yield source.corpus.utterances[row].id, text


def _read(path: Path) -> dict[str, TokenText]:
    """What an earlier run has written; a last line that it did not finish is cut off."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        return {row["id"]: TokenText(row["tokens"], row["ended"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}): remove it") from error
