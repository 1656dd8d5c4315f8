"""Turn a LibriSpeech tree into the shards that `--data=tfds` reads.

    python -m edgespeech.data.prepare --data_dir=data/LibriSpeech --splits=train-clean-5,dev-clean-2 --out=shards

writes OUT/librispeech/lazy_decode/VERSION: ArrayRecord shards of FLAC, as TensorFlow Datasets' own builder makes them,
and for every split a table of lengths. It needs no TensorFlow. Many hosts read a few large files better than 281,241
small ones. Interrupted at any point, the same command goes on where it stopped.
"""

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from edgespeech.data.audio import SAMPLE_RATE, to_int16
from edgespeech.data.corpus import Corpus, write_atomically
from edgespeech.data.folder import FolderCorpus
from edgespeech.data.tfds_source import DATASET
from edgespeech.errors import InputError

VERSION = "2.1.2"  # of the dataset's layout, as TensorFlow Datasets counts it
_NAME = DATASET.partition("/")[0]
_FIRST_NAMED_SPEAKER = 2**40  # LibriSpeech's numbers are below


def split_name(split: str) -> str:
    """The name of a split as TensorFlow Datasets writes it: "train-clean-100" is "train_clean100".

    Raises:
        InputError: a character that the names of shards have no place for.
    """
    name = re.sub(r"-(?=\d)", "", split).replace("-", "_")
    if not re.fullmatch(r"\w+", name, re.ASCII):
        raise InputError(
            f"split {split!r} cannot name a shard; the fix: a folder named with letters, digits, '-' and '_'"
        )
    return name


def speaker_number(speaker: str) -> int:
    """The speaker as the integer that a record holds: its own, or one made from a name, the same in every split."""
    if re.fullmatch(r"0|[1-9]\d{0,11}", speaker):
        return int(speaker)
    digest = hashlib.sha256(speaker.encode()).digest()
    return _FIRST_NAMED_SPEAKER + int.from_bytes(digest[:4], "big")


def cut(lengths: Sequence[int], limit: int) -> list[range]:
    """Rows of each shard: neighbours, equal parts of the whole as nearly as they go, and as few as `limit` allows.

    Args:
        lengths: samples of every utterance.
        limit: samples that a part should not exceed.
    """
    ends = np.cumsum(lengths)
    count = min(len(lengths), max(1, -(-int(ends[-1]) // limit)))
    edges = [0]
    for part in range(1, count):
        wanted = int(np.searchsorted(ends, ends[-1] * part / count)) + 1
        # Every shard has a row, those to come as well.
        edges.append(min(max(wanted, edges[-1] + 1), len(lengths) - (count - part)))
    return [range(*pair) for pair in zip(edges, [*edges[1:], len(lengths)], strict=True)]


def prepare(
    corpus: Corpus,
    out: str | os.PathLike,
    *,
    shard_hours: float = 4.0,
    threads: int = 2,
    quiet: bool = False,
) -> Path:
    """Writes one corpus as a split, all of it or, after an interruption, what is missing.

    A shard appears when it is whole, and the dataset can be opened when all are there. Audio is stored as FLAC, 16 kHz,
    16 bit, mono: samples that are multiples of 2**-15 come back as they are. A speaker who has a name instead of a
    number gets a number.

    Args:
        corpus: its `name` names the split.
        out: what `--data_dir` of `--data=tfds` will name.
        shard_hours: audio in a shard, at most about so much; an hour takes some 60 MB.
        threads: shards at a time.
        quiet: no progress on the terminal.

    Returns:
        The folder of the shards.

    Raises:
        InputError: packages missing, an unusable name of the split, or `out` holds this split made of other data or
            in other shards.
    """
    if not shard_hours > 0:
        raise InputError(f"shard_hours is {shard_hours:g}; the fix: a number above 0")
    tfds, features = _features()
    name, folder = split_name(corpus.name), Path(out) / DATASET / VERSION
    parts = cut([u.num_samples for u in corpus.utterances], int(shard_hours * 3600 * SAMPLE_RATE))
    table = {
        "split": corpus.name,
        "shard_lengths": [len(part) for part in parts],
        # Each row as `TfdsCorpus` keeps it: id, speaker, text, samples, fault.
        "rows": [
            [u.id, str(speaker_number(u.speaker)), u.text, u.num_samples, ""]
            for u in corpus.utterances
        ],
        "skipped": [[s.id, s.reason] for s in corpus.skipped],
    }
    _begin(folder / f"{name}.lengths.json", table)

    def path_of(number: int) -> Path:
        return folder / f"{_NAME}-{name}.array_record-{number:05d}-of-{len(parts):05d}"

    missing = [number for number in range(len(parts)) if not path_of(number).exists()]

    def write(number: int) -> None:
        _write_shard(path_of(number), corpus, parts[number], features)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        done = pool.map(write, missing)
        for _ in tqdm(done, desc=corpus.name, unit="shard", total=len(missing), disable=quiet):
            pass
    _write_info(folder, tfds, features)
    return folder


def _features() -> tuple[Any, Any]:
    """The package, and the features of a record, with FLAC as plain bytes: its Audio would import TensorFlow."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"preparing shards needs a package that is not here ({error}); "
            "the fix: pip install tensorflow-datasets array_record importlib_resources"
        ) from error
    return tfds, tfds.features.FeaturesDict(
        {
            "speech": tfds.features.Scalar(np.object_),
            "text": tfds.features.Text(),
            "speaker_id": np.int64,
            "chapter_id": np.int64,
            "id": np.str_,
        }
    )


def _begin(path: Path, table: dict[str, Any]) -> None:
    """Writes the table of lengths, or checks that what is there was begun with the same."""
    for other in path.parent.glob("*.lengths.json"):
        # Whoever asks for a split need not write its '-' and '_'.
        if other != path and other.name.replace("_", "") == path.name.replace("_", ""):
            raise InputError(
                f"{path.parent} holds {other.name}, and the split {table['split']!r} differs from it by '_' alone; "
                "the fix: rename its folder, or name another folder for the shards"
            )
    try:
        known = json.loads(path.read_bytes())
    except FileNotFoundError:
        content = json.dumps(table).encode()
        write_atomically(path, lambda file: file.write(content))
        return
    if known != table:
        raise InputError(
            f"{path.parent} holds the split {table['split']!r} made of other utterances or in other shards; the fix: "
            f"name another folder, or delete {path.name} and the shards of this split"
        )


def _write_shard(path: Path, corpus: Corpus, rows: range, features: Any) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    unfinished = path.with_name(f".{path.name}.tmp")
    # group_size:1, as the official builder writes: a record is read without its neighbours.
    writer = ArrayRecordWriter(str(unfinished), "group_size:1")
    try:
        for row in rows:
            utterance = corpus.utterances[row]
            flac = io.BytesIO()
            samples = to_int16(corpus.audio(row))
            soundfile.write(flac, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
            chapter = re.fullmatch(r"\d+-(\d{1,18})-\d+", utterance.id)
            record = {
                "speech": flac.getvalue(),
                "text": utterance.text,
                "speaker_id": speaker_number(utterance.speaker),
                "chapter_id": int(chapter[1]) if chapter else 0,
                "id": utterance.id,
            }
            writer.write(features.serialize_example(record))
    finally:
        writer.close()
    os.replace(unfinished, path)


def _write_info(folder: Path, tfds: Any, features: Any) -> None:
    """Describes the splits that are whole, so that TensorFlow Datasets and `TfdsCorpus` find them."""
    splits = []
    for path in sorted(folder.glob("*.lengths.json")):
        name = path.name.removesuffix(".lengths.json")
        lengths = json.loads(path.read_bytes())["shard_lengths"]
        shards = sorted(folder.glob(f"{_NAME}-{name}.array_record-*-of-{len(lengths):05d}"))
        if len(shards) == len(lengths):
            template = tfds.core.ShardedFileTemplate(
                data_dir=folder,
                dataset_name=_NAME,
                split=name,
                filetype_suffix="array_record",
            )
            size = sum(shard.stat().st_size for shard in shards)
            splits.append(
                tfds.core.SplitInfo(
                    name=name, shard_lengths=lengths, num_bytes=size, filename_template=template
                )
            )
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=_NAME,
        config_name=DATASET.partition("/")[2],
        version=tfds.core.Version(VERSION),
        data_dir=str(folder),
        module_name="",
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(splits))
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        info.write_to_directory(unfinished)
        # Whoever finds dataset_info.json finds the rest.
        written = sorted(
            Path(unfinished).iterdir(), key=lambda path: path.name == "dataset_info.json"
        )
        for path in written:
            os.replace(path, folder / path.name)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit with 2 and the message alone when the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m edgespeech.data.prepare",
        description="Turn splits of a LibriSpeech tree into the shards that --data=tfds reads.",
    )
    parser.add_argument("--data_dir", required=True, help="the folder that holds the splits")
    parser.add_argument("--splits", required=True, help="splits, parted by commas")
    parser.add_argument("--out", required=True, help="where the shards go; --data_dir of tfds")
    parser.add_argument(
        "--shard_hours", type=float, default=4.0, help="audio in a shard (default: 4)"
    )
    parser.add_argument("--threads", type=int, default=2, help="shards at a time (default: 2)")
    parser.add_argument("--cache_dir", help="where tables of lengths go (default: user's cache)")
    flags = parser.parse_args(arguments)
    splits = flags.splits.split(",")
    try:
        for split in splits:
            corpus = FolderCorpus(
                flags.data_dir, split, cache_dir=flags.cache_dir, cache_mb=0, threads=flags.threads
            )
            for note in corpus.notes:
                print(f"{split}: {note}")
            for skipped in corpus.skipped:
                print(f"{split}: skipped {skipped.id}: {skipped.reason}")
            prepare(corpus, flags.out, shard_hours=flags.shard_hours, threads=flags.threads)
            print(
                f"{split}: {len(corpus)} utterances, {corpus.hours:.2f} h, {len(corpus.skipped)} skipped"
            )
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on", file=sys.stderr)
        sys.exit(130)
    print(f"Use them with --data=tfds --data_dir={flags.out}")


if __name__ == "__main__":
    main()
