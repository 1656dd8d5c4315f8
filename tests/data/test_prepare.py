import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import soundfile

from edgespeech.data.corpus import Corpus, Utterance
from edgespeech.data.folder import FolderCorpus
from edgespeech.data.prepare import cut, main, prepare, speaker_number, split_name
from edgespeech.data.sources import open_corpus
from edgespeech.data.tfds_source import TfdsCorpus
from edgespeech.errors import InputError

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

FOLDER = "librispeech/lazy_decode/2.1.2"


def add(root, speaker, number, samples, text="SOME  words", suffix="flac", rate=16000):
    folder = root / speaker / "7"
    folder.mkdir(parents=True, exist_ok=True)
    id = f"{speaker}-7-{number:04d}"
    with (folder / f"{speaker}-7.trans.txt").open("a") as file:
        file.write(f"{id} {text} {number}\n")
    soundfile.write(folder / f"{id}.{suffix}", samples, rate)
    return folder / f"{id}.{suffix}"


@pytest.fixture
def tree(tmp_path):
    random = np.random.default_rng(0)
    root = tmp_path / "tree"
    for number in range(7):
        samples = random.uniform(-1, 1, 1600 + 160 * number)
        add(root / "train-clean-5", "20" if number % 2 else "3", number, samples)
    add(root / "train-clean-5", "LJ", 1, random.uniform(-1, 1, (2000, 2)), "it\u2019s", "wav")
    add(root / "train-clean-5", "LJ", 2, random.uniform(-1, 1, 4410), "resampled", "wav", 44100)
    add(root / "dev-clean-2", "5", 1, random.uniform(-1, 1, 1700))
    return root


def both(tree, out, split, cache):
    source = FolderCorpus(tree, split, cache_dir=cache)
    return source, TfdsCorpus(out, split, cache_dir=cache)


def assert_equal(source, read):
    assert [(u.id, u.text, u.num_samples) for u in read.utterances] == [
        (u.id, u.text, u.num_samples) for u in source.utterances
    ]
    assert read.skipped == ()
    for row in range(len(source)):
        np.testing.assert_array_equal(read.audio(row), source.audio(row))


def test_what_is_read_back_equals_the_folder(tree, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [f"--data_dir={tree}", "--splits=train-clean-5,dev-clean-2", f"--out={out}"]
    # 1e-4 hours are 0.36 s: three shards of the 0.95 s of train-clean-5.
    main([*arguments, "--shard_hours=1e-4", f"--cache_dir={tmp_path}"])
    for split, rows in (("train-clean-5", 9), ("dev-clean-2", 1)):
        source, read = both(tree, out, split, tmp_path)
        assert len(source) == rows
        assert_equal(source, read)
    assert len(list((out / FOLDER).glob("*train_clean5*-of-00004"))) == 4
    printed = capsys.readouterr().out
    assert "train-clean-5: 9 utterances, 0.00 h, 0 skipped" in printed
    assert "1 file was at 44100 Hz" in printed
    assert f"Use them with --data=tfds --data_dir={out}" in printed


def test_speakers_stay_apart(tree, tmp_path):
    out = tmp_path / "out"
    prepare(FolderCorpus(tree, "train-clean-5", cache_dir=tmp_path), out, quiet=True)
    source, read = both(tree, out, "train-clean-5", tmp_path)
    pairs = {
        (a.speaker, b.speaker) for a, b in zip(source.utterances, read.utterances, strict=True)
    }
    assert {a for a, _ in pairs} == {"20", "3", "LJ"}
    assert len(pairs) == 3
    assert {("20", "20"), ("3", "3")} < pairs


def test_tensorflow_datasets_reads_it_too(tree, tmp_path):
    out = tmp_path / "out"
    for split in ("train-clean-5", "dev-clean-2"):
        prepare(FolderCorpus(tree, split, cache_dir=tmp_path), out, shard_hours=1e-4, quiet=True)
    builder = tfds.builder_from_directory(out / FOLDER)
    assert builder.info.full_name == "librispeech/lazy_decode/2.1.2"
    counts = {name: info.num_examples for name, info in builder.info.splits.items()}
    assert counts == {"train_clean5": 9, "dev_clean2": 1}
    source = FolderCorpus(tree, "train-clean-5", cache_dir=tmp_path)
    records = builder.as_data_source("train_clean5")
    assert len(records) == 9
    for row, record in enumerate(records):
        utterance = source.utterances[row]
        assert record["id"].decode() == utterance.id
        assert record["text"].decode() == utterance.text
        assert record["chapter_id"] == (0 if utterance.speaker == "LJ" else 7)
        assert record["speech"][:4] == b"fLaC"
    assert "tensorflow" not in sys.modules


def test_the_table_holds_the_lengths(tree, tmp_path):
    source = FolderCorpus(tree, "train-clean-5", cache_dir=tmp_path)
    folder = prepare(source, tmp_path / "out", shard_hours=1e-4, quiet=True)
    table = json.loads((folder / "train_clean5.lengths.json").read_bytes())
    assert [(row[0], row[2], row[3], row[4]) for row in table["rows"]] == [
        (u.id, u.text, u.num_samples, "") for u in source.utterances
    ]
    assert sum(table["shard_lengths"]) == len(source)


def test_a_bad_file_is_named_and_left_out(tree, tmp_path, capsys):
    bad = tree / "train-clean-5" / "3" / "7" / "3-7-0002.flac"
    bad.write_bytes(bad.read_bytes()[:500])
    main(
        [
            *(f"--data_dir={tree}", "--splits=train-clean-5", f"--out={tmp_path / 'out'}"),
            f"--cache_dir={tmp_path}",
        ]
    )
    assert "train-clean-5: skipped 3-7-0002: " in capsys.readouterr().out
    source, read = both(tree, tmp_path / "out", "train-clean-5", tmp_path)
    assert len(source) == 8
    assert_equal(source, read)


def test_an_interrupted_run_goes_on_where_it_was(tree, tmp_path, monkeypatch):
    out = tmp_path / "out"
    source = FolderCorpus(tree, "train-clean-5", cache_dir=tmp_path)
    audio, calls = source.audio, []

    def breaking(row):
        calls.append(row)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return audio(row)

    monkeypatch.setattr(source, "audio", breaking)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, out, shard_hours=1e-4, threads=1, quiet=True)
    done = {path: path.stat().st_mtime_ns for path in (out / FOLDER).glob("librispeech-*")}
    assert 0 < len(done) < 4
    with pytest.raises(InputError, match="no prepared"):
        TfdsCorpus(out, "train-clean-5", cache_dir=tmp_path)
    calls.clear()
    calls.extend([0] * 10)
    prepare(source, out, shard_hours=1e-4, threads=1, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert_equal(*both(tree, out, "train-clean-5", tmp_path))
    # What was done is not touched again.
    monkeypatch.setattr(source, "audio", None)
    prepare(source, out, shard_hours=1e-4, quiet=True)


def test_a_killed_run_leaves_no_half_shard(tree, tmp_path):
    """Killed while it writes its second shard; the first is whole, and a second run completes the rest."""
    out = tmp_path / "out"
    code = f"""
import sys, time
from edgespeech.data.folder import FolderCorpus
from edgespeech.data.prepare import prepare
corpus = FolderCorpus({str(tree)!r}, "train-clean-5", cache_dir={str(tmp_path)!r})
audio = corpus.audio
def slow(row):
    if row == 4:
        print("writing", flush=True)
        time.sleep(600)
    return audio(row)
corpus.audio = slow
prepare(corpus, {str(out)!r}, shard_hours=1e-4, threads=1, quiet=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(name.endswith(".tmp") for name in os.listdir(out / FOLDER))
    main(
        [
            *(f"--data_dir={tree}", "--splits=train-clean-5", f"--out={out}"),
            *("--shard_hours=1e-4", f"--cache_dir={tmp_path}"),
        ]
    )
    assert_equal(*both(tree, out, "train-clean-5", tmp_path))
    assert not any(name.endswith(".tmp") for name in os.listdir(out / FOLDER))


def test_other_data_or_shards_are_refused(tree, tmp_path):
    source = FolderCorpus(tree, "train-clean-5", cache_dir=tmp_path)
    prepare(source, tmp_path / "out", quiet=True)
    with pytest.raises(InputError, match="'train-clean-5' made of other utterances or in other"):
        prepare(source, tmp_path / "out", shard_hours=1e-4, quiet=True)
    add(tree / "train-clean-5", "20", 9, np.zeros(1600))
    more = FolderCorpus(tree, "train-clean-5", cache_dir=tmp_path)
    with pytest.raises(InputError, match="delete train_clean5"):
        prepare(more, tmp_path / "out", quiet=True)


def test_splits_that_a_reader_could_not_tell_apart(tree, tmp_path):
    (tree / "dev-clean-2").rename(tree / "train_clean_5")
    for split in ("train-clean-5", "train_clean_5"):
        corpus = FolderCorpus(tree, split, cache_dir=tmp_path)
        if split == "train-clean-5":
            prepare(corpus, tmp_path / "out", quiet=True)
            continue
        with pytest.raises(InputError, match="differs from it by '_' alone"):
            prepare(corpus, tmp_path / "out", quiet=True)


def test_a_split_is_added_to_those_that_are_there(tree, tmp_path):
    out = tmp_path / "out"
    prepare(FolderCorpus(tree, "dev-clean-2", cache_dir=tmp_path), out, quiet=True)
    assert_equal(*both(tree, out, "dev-clean-2", tmp_path))
    prepare(FolderCorpus(tree, "train-clean-5", cache_dir=tmp_path), out, quiet=True)
    joined = open_corpus(
        "tfds", "train-clean-5+dev-clean-2", data_dir=[str(out)], cache_dir=tmp_path
    )
    assert len(joined) == 10


def test_cut():
    assert cut([10] * 6, 1000) == [range(0, 6)]
    assert cut([10] * 6, 20) == [range(0, 2), range(2, 4), range(4, 6)]
    # Every part has a row, even if one alone is longer than a part should be.
    assert cut([1, 1, 100], 40) == [range(0, 1), range(1, 2), range(2, 3)]
    assert cut([100, 1, 1], 40) == [range(0, 1), range(1, 2), range(2, 3)]
    for seed in range(20):
        random = np.random.default_rng(seed)
        lengths = random.integers(1, 50, random.integers(1, 40)).tolist()
        parts = cut(lengths, 60)
        assert [row for part in parts for row in part] == list(range(len(lengths)))
        assert min(map(len, parts)) > 0
        sums = [sum(lengths[row] for row in part) for part in parts]
        assert max(sums) <= 60 + 2 * max(lengths)


def test_names():
    official = {
        **{"train-clean-100": "train_clean100", "test-other": "test_other"},
        **{"dev-clean-2": "dev_clean2", "train-cv1": "train_cv1"},
    }
    assert {name: split_name(name) for name in official} == official
    with pytest.raises(InputError, match=r"split 'a\.b' cannot name a shard"):
        split_name("a.b")
    assert [speaker_number(s) for s in ("0", "1089", "84")] == [0, 1089, 84]
    # Not the same as the speaker 7.
    assert speaker_number("007") != speaker_number("7") == 7
    assert speaker_number("LJ") == speaker_number("LJ") > 2**39
    assert speaker_number("LJ") != speaker_number("LK")
    assert speaker_number("9" * 15) < 2**63


def test_errors(tree, tmp_path, capsys, monkeypatch):
    for arguments, message in (
        ([f"--data_dir={tree}", "--splits=none"], "has no split 'none'"),
        ([f"--data_dir={tree}", "--splits=dev-clean-2", "--shard_hours=0"], "shard_hours is 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, f"--out={tmp_path / 'out'}", f"--cache_dir={tmp_path}"])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match="pip install tensorflow-datasets"):
        prepare(FolderCorpus(tree, "dev-clean-2", cache_dir=tmp_path), tmp_path / "out")


def test_samples_of_any_corpus_are_stored_to_the_bit(tmp_path):
    """Full scale, silence, and a single sample survive FLAC."""
    signals = [
        np.array([-1.0, 32767 / 32768, 0.0, -(2.0**-15)] * 50, np.float32),
        np.zeros(900, np.float32),
        np.array([0.5], np.float32),
    ]

    class Signals(Corpus):
        kind, name = "tones", "odd"
        utterances = tuple(Utterance(f"a{i}", "1", "A", len(s)) for i, s in enumerate(signals))

        def audio(self, index):
            return signals[index]

    prepare(Signals(), tmp_path / "out", quiet=True)
    read = TfdsCorpus(tmp_path / "out", "odd", cache_dir=tmp_path)
    for row, signal_ in enumerate(signals):
        np.testing.assert_array_equal(read.audio(row), signal_)


OFFICIAL = """
import sys, tarfile
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.datasets.librispeech import librispeech_dataset_builder as official

root = Path(sys.argv[1])
(root / "manual").mkdir()
archive = root / "manual" / "dev-clean.tar.gz"
with tarfile.open(archive, "w:gz") as tar:
    tar.add(root / "LibriSpeech", "LibriSpeech")
url = official._DL_URLS["dev_clean"]
official._DL_URLS = {"dev_clean": url}
builder = tfds.builder("librispeech/lazy_decode", data_dir=root / "theirs", file_format="array_record")
type(builder).url_infos[url] = checksums.compute_url_info(archive)
builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(
        manual_dir=root / "manual", try_download_gcs=False
    )
)
# The official builder takes our shards for its own.
ours = tfds.builder("librispeech/lazy_decode", data_dir=root / "ours", file_format="array_record")
for record in ours.as_data_source("dev_clean"):
    print(record["id"].decode(), record["speaker_id"], record["chapter_id"])
"""


@pytest.mark.skipif(not find_spec("tensorflow"), reason="needs the extra tfds")
def test_the_official_builder_makes_and_reads_the_same(tmp_path):
    """Offline, on an archive made here; in a process of its own, which TensorFlow stays in."""
    tree = tmp_path / "LibriSpeech"
    random = np.random.default_rng(0)
    for speaker in ("84", "174"):
        for number in range(3):
            add(tree / "dev-clean", speaker, number, random.uniform(-1, 1, 1600 + number), "DON'T")
    (tree / "SPEAKERS.TXT").write_text(
        "84 | F | dev-clean | 8.02 | A\n174 | M | dev-clean | 8 | B\n"
    )
    (tree / "CHAPTERS.TXT").write_text("7 | 84 | 1.0 | dev-clean | 1 | 2 | A | B\n")
    source = FolderCorpus(tree, "dev-clean", cache_dir=tmp_path)
    prepare(source, tmp_path / "ours", quiet=True)
    done = subprocess.run(
        [sys.executable, "-c", OFFICIAL, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    records = [line for line in done.stdout.splitlines() if line.endswith(" 7")]
    assert records == [f"{u.id} {u.speaker} 7" for u in source.utterances]

    def contents(corpus):
        return {u: corpus.audio(row).tobytes() for row, u in enumerate(corpus.utterances)}

    theirs = TfdsCorpus(tmp_path / "theirs", "dev-clean", cache_dir=tmp_path)
    ours = TfdsCorpus(tmp_path / "ours", "dev-clean", cache_dir=tmp_path)
    assert contents(theirs) == contents(ours) == contents(source)
