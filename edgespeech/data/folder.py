"""Speech in a LibriSpeech tree: SPLIT/SPEAKER/CHAPTER/{SPEAKER-CHAPTER.trans.txt, ID.flac}.

The layout is that of Panayotov et al. (2015).
"""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from edgespeech.data.audio import SAMPLE_RATE, from_int16, read_audio, read_int16, to_int16
from edgespeech.data.corpus import Corpus, Skipped, Utterance, cache_folder, write_atomically
from edgespeech.errors import InputError

EXTENSIONS = (".flac", ".wav", ".opus", ".ogg", ".mp3")
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2019\u2018\u02bc\u02b9\uff07\u00b4`", "'"))
_TABLE_VERSION = f"1 soundfile {soundfile.__libsndfile_version__} soxr {soxr.__version__}"


class _Entry(NamedTuple):
    """What decoding a file told: `num_samples` at 16 kHz, or the fault that forbids its use."""

    size: int
    mtime_ns: int
    num_samples: int
    channels: int
    rate: int
    fault: str


def normalise_text(text: str) -> str:
    """Upper case, single spaces, and one kind of apostrophe; nothing else is changed or removed."""
    return " ".join(text.translate(_APOSTROPHES).upper().split())


class FolderCorpus(Corpus):
    """One split of a LibriSpeech tree, in the order speaker, chapter, id (as strings).

    Audio is FLAC, WAV, Opus, Ogg or MP3, any rate and channel count. Opening decodes each file once
    to learn its length and faults; the table is cached by (path, size, mtime_ns), so that the next
    opening reads no audio. An utterance with a fault (missing or empty transcript, missing audio,
    unreadable, truncated, zero length, NaN) is left out and named in `skipped`. Samples are rounded
    to int16, whether or not they were kept in memory.

    Args:
        data_dir: the folder that holds the split folders.
        split: name of one split folder, such as "train-clean-100".
        require_text: leave out audio without a transcript; otherwise its text is empty.
        cache_dir: where the table goes; see `corpus.cache_folder`.
        cache_mb: MB (2**20 bytes) of decoded int16 audio to keep in memory; what exceeds it is
            decoded each time.
        threads: threads that decode while opening.

    Raises:
        InputError: missing folder, not a LibriSpeech tree, missing or empty split, or every
            utterance skipped; the message names the path, the splits found and the fix.
    """

    kind = "folder"

    def __init__(
        self,
        data_dir: str | os.PathLike,
        split: str,
        *,
        require_text: bool = True,
        cache_dir: str | os.PathLike | None = None,
        cache_mb: float = 2048,
        threads: int = 2,
    ):
        self.name = split
        self._root = _split_folder(Path(data_dir), split)
        self._memory: dict[Path, np.ndarray] = {}
        self._memory_left = int(cache_mb * 2**20)
        self._lock = threading.Lock()
        texts, files, skipped, notes = _read_tree(self._root)
        paths = [files[id] for id in sorted(files)]
        entries, remark = self._inspect(paths, cache_folder(cache_dir, "folder"), threads)

        utterances = []
        self._paths: list[Path] = []
        for id in sorted({*texts, *files}, key=lambda id: _order(id, texts, files)):
            text = texts[id][0] if id in texts else ""
            if id not in files:
                skipped.append(Skipped(id, "missing audio"))
            elif require_text and not text:
                reason = "empty transcript" if id in texts else "missing transcript"
                skipped.append(Skipped(id, reason))
            elif entries[files[id]].fault:
                skipped.append(Skipped(id, entries[files[id]].fault))
            else:
                path = files[id]
                speaker = path.relative_to(self._root).parts[0]
                utterances.append(Utterance(id, speaker, text, entries[path].num_samples))
                self._paths.append(path)
        self.utterances = tuple(utterances)
        self.skipped = tuple(skipped)
        self.notes = (*notes, *remark, *_conversions([entries[path] for path in self._paths]))
        if not utterances:
            counts = Counter(s.reason for s in skipped).most_common(3)
            reasons = "; ".join(f"{count} x {reason}" for reason, count in counts)
            raise InputError(
                f"{self._root}: all {len(skipped)} utterances were skipped ({reasons}); "
                "the fix: repair the files, or choose another split"
                + _others(self._root.parent, split)
            )

    def audio(self, index: int) -> np.ndarray:
        """Samples of one utterance: float32 `[t]` in [-1, 1), multiples of 2**-15.

        Raises:
            InputError: the file has changed since the corpus was opened.
        """
        path = self._paths[index]
        samples = self._memory.get(path)
        if samples is None:
            samples = read_int16(path)
            self._remember(path, samples)
        expected = self.utterances[index].num_samples
        if len(samples) != expected:
            raise InputError(
                f"{path}: {len(samples)} samples, but {expected} when the corpus was opened; "
                "the fix: open the corpus again, and leave its files alone while it is in use"
            )
        return from_int16(samples)

    def _remember(self, path: Path, samples: np.ndarray) -> None:
        with self._lock:
            if path not in self._memory and samples.nbytes <= self._memory_left:
                self._memory[path] = samples
                self._memory_left -= samples.nbytes

    def _inspect(
        self, paths: Sequence[Path], folder: Path, threads: int
    ) -> tuple[dict[Path, _Entry], list[str]]:
        digest = hashlib.sha256(str(self._root.resolve()).encode()).hexdigest()[:16]
        table_path = folder / f"{digest}.json"
        old, remark = _load_table(table_path)

        def entry(path: Path) -> _Entry:
            status = path.stat()
            known = old.get(str(path.relative_to(self._root)))
            if known and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
                return known
            return self._decode(path, status)

        with ThreadPoolExecutor(max(1, threads)) as pool:
            entries = dict(zip(paths, pool.map(entry, paths), strict=True))
        rows = {str(path.relative_to(self._root)): list(entries[path]) for path in paths}
        if {name: list(known) for name, known in old.items()} != rows:
            content = json.dumps({"version": _TABLE_VERSION, "files": rows}).encode()
            try:
                write_atomically(table_path, lambda file: file.write(content))
            except OSError as error:
                remark.append(
                    f"the table of lengths could not be kept ({error}): opening decodes again"
                )
        return entries, remark

    def _decode(self, path: Path, status: os.stat_result) -> _Entry:
        try:
            recording = read_audio(path)
        except InputError as error:
            fault = str(error).removeprefix(f"{path}: ").split("; the fix")[0]
            return _Entry(status.st_size, status.st_mtime_ns, 0, 0, 0, fault)
        self._remember(path, to_int16(recording.samples))
        length = len(recording.samples)
        return _Entry(
            status.st_size, status.st_mtime_ns, length, recording.channels, recording.rate, ""
        )


def _is_split(folder: Path) -> bool:
    return any(folder.glob("*/*/*.trans.txt"))


def _others(data_dir: Path, split: str) -> str:
    found = sorted(p.name for p in data_dir.iterdir() if p.is_dir() and _is_split(p))
    found = [name for name in found if name != split]
    return f" (splits found in {data_dir}: {', '.join(found) or 'no other'})"


def _split_folder(data_dir: Path, split: str) -> Path:
    if not data_dir.is_dir():
        raise InputError(
            f"{data_dir} is not a folder; "
            "the fix: name the folder that holds the splits, such as LibriSpeech"
        )
    if split and (data_dir / split).is_dir():
        if any(path.suffix.lower() in EXTENSIONS for path in (data_dir / split).glob("*/*/*")):
            return data_dir / split
        if _is_split(data_dir / split):
            reason = "has transcripts and no audio"
        elif any((data_dir / split).iterdir()):
            reason = "is not a LibriSpeech tree (no SPEAKER/CHAPTER/ID audio in it)"
        else:
            reason = "is empty"
        raise InputError(
            f"{data_dir / split} {reason}; the fix: put SPEAKER/CHAPTER/ID.flac and "
            "SPEAKER-CHAPTER.trans.txt there, or choose another split" + _others(data_dir, split)
        )
    if _is_split(data_dir):
        raise InputError(
            f"{data_dir} holds speaker folders: it is itself a split; the fix: use the data folder "
            f"{str(data_dir.resolve().parent)!r} and the split {data_dir.resolve().name!r}"
        )
    nested = [path for path in sorted(data_dir.iterdir()) if any(path.glob("*/*/*/*.trans.txt"))]
    if nested:
        raise InputError(
            f"{data_dir} holds no split, but {nested[0]} does; "
            f"the fix: use {str(nested[0])!r} as the data folder"
        )
    others = _others(data_dir, split)
    if others.endswith("no other)"):
        raise InputError(
            f"{data_dir} is not a LibriSpeech tree: no SPLIT/SPEAKER/CHAPTER/*.trans.txt in it; "
            "the fix: name the folder that holds the splits"
        )
    raise InputError(f"{data_dir} has no split {split!r}; the fix: choose another{others}")


def _read_tree(
    root: Path,
) -> tuple[dict[str, tuple[str, Path]], dict[str, Path], list[Skipped], list[str]]:
    """Transcripts (text, folder) and audio files by id, damaged transcript files, and remarks."""
    texts: dict[str, tuple[str, Path]] = {}
    files: dict[str, Path] = {}
    skipped: list[Skipped] = []
    doubles = 0
    for chapter in sorted(path for path in root.glob("*/*") if path.is_dir()):
        names = sorted(path for path in chapter.iterdir() if not path.name.startswith("."))
        for path in names:
            if path.name.endswith(".trans.txt"):
                try:
                    lines = path.read_text(encoding="utf-8-sig").splitlines()
                except (UnicodeDecodeError, OSError) as error:
                    skipped.append(
                        Skipped(str(path.relative_to(root)), f"unreadable transcripts ({error})")
                    )
                    continue
                for id, _, text in (line.strip().partition(" ") for line in lines if line.strip()):
                    if id in texts:
                        skipped.append(
                            Skipped(id, f"second transcript, in {path.relative_to(root)}")
                        )
                    else:
                        texts[id] = (normalise_text(text), chapter)
        audio = [path for path in names if path.suffix.lower() in EXTENSIONS and path.is_file()]
        for path in sorted(audio, key=lambda path: EXTENSIONS.index(path.suffix.lower())):
            if path.stem not in files:
                files[path.stem] = path
            elif files[path.stem].parent == chapter:
                doubles += 1
            else:
                skipped.append(Skipped(path.stem, f"second audio file, {path.relative_to(root)}"))
    notes = []
    if doubles:
        order = ", ".join(EXTENSIONS)
        notes.append(f"{_files(doubles)} left out for a twin: the first format of {order} is read")
    return texts, files, skipped, notes


def _order(id: str, texts: dict[str, tuple[str, Path]], files: dict[str, Path]) -> tuple:
    return ((files[id].parent if id in files else texts[id][1]).parts, id)


def _load_table(path: Path) -> tuple[dict[str, _Entry], list[str]]:
    try:
        table = json.loads(path.read_bytes())
        if table["version"] != _TABLE_VERSION:
            return {}, []
        entries = {name: _Entry(*row) for name, row in table["files"].items()}
        for entry in entries.values():
            if [type(value) for value in entry] != [int] * 5 + [str] or min(entry[:5]) < 0:
                raise ValueError(f"an entry is {entry}")
        return entries, []
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}, ["the cached table of lengths was damaged: it was made again"]


def _conversions(entries: Sequence[_Entry]) -> list[str]:
    notes = []
    for channels, count in sorted(Counter(e.channels for e in entries if e.channels > 1).items()):
        kind = "stereo" if channels == 2 else f"{channels} channels"
        notes.append(f"{_files(count)} {kind}: mixed to mono")
    for rate, count in sorted(Counter(e.rate for e in entries if e.rate != SAMPLE_RATE).items()):
        notes.append(f"{_files(count)} at {rate} Hz: resampled to {SAMPLE_RATE} Hz")
    return notes


def _files(count: int) -> str:
    return "1 file was" if count == 1 else f"{count} files were"
