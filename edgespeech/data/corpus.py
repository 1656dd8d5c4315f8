"""What a corpus is: a table of utterances, their audio by row, and what was left out."""

import os
import struct
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edgespeech.data.audio import SAMPLE_RATE
from edgespeech.errors import InputError

# What reading a damaged `.npz` raises: of the archive, its packing, the headers of its arrays, and their sizes.
MALFORMED_NPZ = (
    *(OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError),
    *(MemoryError, zipfile.BadZipFile, zlib.error, struct.error),
)


@dataclass(frozen=True)
class Utterance:
    """One utterance: `num_samples` counts samples at 16 kHz, `text` is upper case."""

    id: str
    speaker: str
    text: str
    num_samples: int


@dataclass(frozen=True)
class Skipped:
    """An utterance (or file) that was left out, and why."""

    id: str
    reason: str


class Corpus(ABC):
    """Utterances in a fixed order, with their audio by row.

    `kind` is "synthetic", "folder" or "tfds" (a join of several kinds carries them all, as in
    "folder+synthetic"); `notes` are things to say once: "12 files were stereo".
    `audio` may be called from several threads.
    """

    kind: str
    name: str
    utterances: tuple[Utterance, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @abstractmethod
    def audio(self, index: int) -> np.ndarray:
        """Samples of one utterance: float32 `[t]` in [-1, 1] at 16 kHz, t = its `num_samples`."""

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def hours(self) -> float:
        """Total duration of the utterances in hours."""
        return sum(u.num_samples for u in self.utterances) / SAMPLE_RATE / 3600


class _View(Corpus):
    """Rows of other corpora: what `join` and `subset` return."""

    def __init__(self, parts: Sequence[Corpus], name: str, rows: Sequence[tuple[Corpus, int]]):
        self.kind = "+".join(sorted({part.kind for part in parts}))
        self.name = name
        self.utterances = tuple(part.utterances[index] for part, index in rows)
        self.skipped = tuple(s for part in parts for s in part.skipped)
        self.notes = tuple(f"{part.name}: {note}" for part in parts for note in part.notes)
        self._rows = tuple(rows)

    def audio(self, index: int) -> np.ndarray:
        part, row = self._rows[index]
        return part.audio(row)


def join(corpora: Sequence[Corpus]) -> Corpus:
    """The utterances of several corpora, one after the other; one corpus alone stays as it is.

    Raises:
        InputError: no corpus, or an utterance id that occurs in two of them.
    """
    if not corpora:
        raise InputError("join: no corpus given; the fix: give at least one")
    if len(corpora) == 1:
        return corpora[0]
    owner: dict[str, str] = {}
    for corpus in corpora:
        for utterance in corpus.utterances:
            if utterance.id in owner:
                raise InputError(
                    f"utterance id {utterance.id!r} occurs in {owner[utterance.id]!r} and in "
                    f"{corpus.name!r}: ids must be unique; the fix: name each split once, or "
                    "rename the files of one copy"
                )
            owner[utterance.id] = corpus.name
    rows = [(corpus, index) for corpus in corpora for index in range(len(corpus))]
    return _View(corpora, "+".join(corpus.name for corpus in corpora), rows)


def subset(corpus: Corpus, indices: Sequence[int]) -> Corpus:
    """The given rows of a corpus, in the given order; `skipped` and `notes` stay the corpus's.

    Raises:
        InputError: a row outside the corpus, or named twice.
    """
    rows = [int(index) for index in indices]
    outside = [index for index in rows if not 0 <= index < len(corpus)]
    if outside:
        raise InputError(
            f"row {outside[0]} is outside {corpus.name!r}, which has {len(corpus)} utterances; "
            f"the fix: choose rows from 0 to {len(corpus) - 1}"
        )
    if len(set(rows)) != len(rows):
        twice = next(index for index in rows if rows.count(index) > 1)
        raise InputError(
            f"row {twice} of {corpus.name!r} is named twice; the fix: name each row once"
        )
    return _View([corpus], corpus.name, [(corpus, index) for index in rows])


def cache_folder(cache_dir: str | os.PathLike | None, kind: str) -> Path:
    """Folder for derived files of one kind; it is not created here.

    It lies under `cache_dir`, or else under $XDG_CACHE_HOME/edgespeech (~/.cache/edgespeech).
    """
    if cache_dir is not None:
        return Path(cache_dir) / kind
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "edgespeech" / kind


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a whole file or nothing: a reader never sees half of it, whoever else is writing it.

    Args:
        path: the file; its folder is made when missing.
        write: called with a temporary file, which then takes the file's place.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
