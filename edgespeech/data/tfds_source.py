"""LibriSpeech from TensorFlow Datasets: prepared ArrayRecord shards, read without TensorFlow."""

import hashlib
import io
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edgespeech.data.audio import from_int16, read_audio, read_int16
from edgespeech.data.corpus import Corpus, Skipped, Utterance, cache_folder, write_atomically
from edgespeech.data.folder import normalise_text
from edgespeech.errors import InputError

DATASET = "librispeech/lazy_decode"


class TfdsCorpus(Corpus):
    """One split of `librispeech/lazy_decode` as TensorFlow Datasets prepares it, in its order.

    The dataset must be prepared already, with `file_format="array_record"`; the records then hold
    FLAC bytes, which are decoded here. Opening decodes each record once for its length and faults,
    and keeps the table in the cache, by the names, sizes and times of the shards. An utterance with
    a fault is left out and named in `skipped`. Samples are rounded to int16.

    Args:
        data_dir: the data_dir of TensorFlow Datasets (it holds librispeech/lazy_decode/VERSION), or
            the VERSION folder itself.
        split: "train_clean100" as TensorFlow Datasets names it, or "train-clean-100".
        cache_dir: where the table goes; see `corpus.cache_folder`.
        threads: threads that decode while opening.

    Raises:
        InputError: packages, dataset, split or shards missing, or every utterance skipped.
    """

    kind = "tfds"

    def __init__(
        self,
        data_dir: str | os.PathLike,
        split: str,
        *,
        cache_dir: str | os.PathLike | None = None,
        threads: int = 2,
    ):
        try:
            import tensorflow_datasets as tfds
            from array_record.python.array_record_data_source import ArrayRecordDataSource
        except ImportError as error:
            raise InputError(
                f"data of kind 'tfds' needs a package that is not here ({error}); "
                "the fix: pip install tensorflow-datasets array_record importlib_resources"
            ) from error
        shards = _shards(_prepared_folder(Path(data_dir)), split)
        self.name = split
        self._records = ArrayRecordDataSource([str(path) for path in shards])
        # Text and audio as plain bytes: the Audio and Text features would import TensorFlow.
        self._features = tfds.features.FeaturesDict(
            {
                "id": np.object_,
                "speaker_id": np.int64,
                "speech": tfds.features.Scalar(np.object_),
                "text": np.object_,
            }
        )
        self._lock = threading.Lock()
        rows, self.notes = self._table(shards, cache_folder(cache_dir, "tfds"), threads)
        self._positions = [position for position, row in enumerate(rows) if not row[4]]
        self.utterances = tuple(Utterance(*rows[position][:4]) for position in self._positions)
        self.skipped = tuple(Skipped(row[0], row[4]) for row in rows if row[4])
        if not self.utterances:
            first = f"; the first, {rows[0][0]}: {rows[0][4]}" if rows else ""
            raise InputError(
                f"{shards[0].parent}: all {len(rows)} utterances of {split!r} were skipped{first}; "
                "the fix: prepare the dataset again"
            )

    def audio(self, index: int) -> np.ndarray:
        """Samples of one utterance: float32 `[t]` in [-1, 1), multiples of 2**-15."""
        record = self._record(self._positions[index])
        name = self.utterances[index].id
        return from_int16(read_int16(io.BytesIO(record["speech"]), name))

    def _record(self, position: int) -> Any:
        with self._lock:  # the reader of ArrayRecord says nothing about threads
            serialised = self._records[position]
        return self._features.deserialize_example_np(serialised)

    def _inspect(self, position: int) -> list:
        """id, speaker, text, samples at 16 kHz, fault."""
        record = self._record(position)
        id = record["id"].decode()
        text = normalise_text(record["text"].decode(errors="replace"))
        length, fault = 0, "" if text else "empty transcript"
        try:
            length = len(read_audio(io.BytesIO(record["speech"]), id).samples)
        except InputError as error:
            fault = str(error).removeprefix(f"{id}: ").split("; the fix")[0]
        return [id, str(record["speaker_id"]), text, length, fault]

    def _table(
        self, shards: list[Path], folder: Path, threads: int
    ) -> tuple[list[list], tuple[str, ...]]:
        stats = [(str(path.resolve()), path.stat()) for path in shards]
        key = json.dumps([1, [(name, s.st_size, s.st_mtime_ns) for name, s in stats]])
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        notes = []
        try:
            rows = json.loads(path.read_bytes())
            if len(rows) == len(self._records) and all(len(row) == 5 for row in rows):
                return rows, ()
            notes.append("the cached table of lengths was damaged: it was made again")
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError):
            notes.append("the cached table of lengths was damaged: it was made again")
        with ThreadPoolExecutor(max(1, threads)) as pool:
            rows = list(pool.map(self._inspect, range(len(self._records))))
        content = json.dumps(rows).encode()
        try:
            write_atomically(path, lambda file: file.write(content))
        except OSError as error:
            notes.append(f"the table of lengths could not be kept ({error}): opening decodes again")
        return rows, tuple(notes)


def _prepared_folder(data_dir: Path) -> Path:
    if (data_dir / "dataset_info.json").is_file():
        return data_dir
    versions = [path.parent for path in data_dir.glob(f"{DATASET}/*/dataset_info.json")]
    if not versions:
        raise InputError(
            f"{data_dir} holds no prepared {DATASET}; the fix: make it from a LibriSpeech tree with "
            "python -m edgespeech.data.prepare, or with TensorFlow Datasets (builder 'librispeech/lazy_decode', "
            "file_format='array_record', which needs the extra tfds), and name its data_dir; kind 'folder' reads the "
            "tree directly"
        )
    return max(versions, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def _shards(folder: Path, split: str) -> list[Path]:
    """Shard files of a split, complete and in order; `-` and `_` in its name do not count."""
    found: dict[str, dict[int, Path]] = {}
    totals: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"\w+-(\w+)\.array_record-(\d+)-of-(\d+)", path.name)
        if match:
            found.setdefault(match[1], {})[int(match[2])] = path
            totals[match[1]] = int(match[3])
    names = [name for name in found if name.replace("_", "") == re.sub("[-_]", "", split)]
    if not names:
        have = ", ".join(sorted(found)) or "none in the array_record format"
        raise InputError(
            f"{folder} has no split {split!r}; the fix: choose one of its splits ({have}), or "
            "prepare the dataset with file_format='array_record'"
        )
    (name,) = names
    missing = set(range(totals[name])) - set(found[name])
    if missing:
        raise InputError(
            f"{folder}: shard {min(missing)} of {totals[name]} of split {name!r} is missing "
            f"({len(missing)} in all); the fix: prepare or copy the dataset again"
        )
    return [found[name][number] for number in sorted(found[name])]
