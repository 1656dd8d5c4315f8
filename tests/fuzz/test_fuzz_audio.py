"""Damaged audio files: finite samples in [-1, 1] or a message."""

import io
import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from hypothesis import given

from edgespeech.data import synthetic
from edgespeech.data.audio import RATES, read_audio
from edgespeech.data.corpus import MALFORMED_NPZ
from edgespeech.data.folder import FolderCorpus
from edgespeech.errors import InputError
from edgespeech.inference.long_audio import LongAudio
from tests.fuzz.damage import bounded, damaged, damaged_json, fuzz, read_or_refuse

KINDS = (
    ("WAV", "PCM_16", 2, 8_000),
    ("WAV", "FLOAT", 1, 16_000),
    ("WAVEX", "PCM_24", 2, 44_100),
    ("RF64", "PCM_16", 1, 16_000),
    ("FLAC", "PCM_16", 2, 22_050),
    ("OGG", "VORBIS", 1, 16_000),
    ("OGG", "OPUS", 1, 16_000),
    ("MP3", "MPEG_LAYER_III", 1, 16_000),
    ("AIFF", "PCM_16", 1, 16_000),
)


def encoded(container, subtype, channels, rate, seconds=0.1):
    noise = 0.2 * np.random.default_rng(0).normal(size=(round(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, np.clip(noise, -1, 1), rate, subtype=subtype, format=container)
    return file.getvalue()


FILES = [encoded(*kind) for kind in KINDS]


def check(samples):
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert len(samples) > 0
    assert np.abs(samples).max() <= 1.0  # NaN neither


@pytest.mark.parametrize("data", FILES, ids=[kind[1] for kind in KINDS])
def test_sound_files_are_read(data):
    check(read_audio(io.BytesIO(data)).samples)


@fuzz(250)
@given(data=damaged(*FILES))
def test_whole_files(data):
    recording = read_or_refuse(read_audio, io.BytesIO(data), "it")
    if recording is not None:
        check(recording.samples)
        assert RATES[0] <= recording.rate <= RATES[1]


@fuzz(100)
@given(data=damaged(*FILES))
def test_blocks(data, tmp_path_factory):
    """The reader of `transcribe` and `enhance`, without a model."""
    path = tmp_path_factory.getbasetemp() / "blocks.wav"
    path.write_bytes(data)
    joined = SimpleNamespace(stream=lambda blocks: np.concatenate([np.zeros(0), *blocks]))
    samples = read_or_refuse(LongAudio.file, joined, path)
    assert samples is None or (np.abs(samples) <= 1).all()


def wav(rate=16_000, channels=1, bits=16, data_bytes=2000, riff_bytes=2036, code=1):
    """A WAV file of 1000 samples whose header says what it is told."""
    block = channels * bits // 8
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", riff_bytes, b"WAVE", b"fmt ", 16, code, channels, rate),
        *(rate * block % 2**32, block % 2**16, bits, b"data", data_bytes),
    )
    return header + struct.pack("<1000h", *range(1000))


@pytest.mark.parametrize(
    "changes",
    [
        *({"rate": rate} for rate in (0, 1, 3_999, 384_001, 2**31, 2**32 - 1)),
        *({"channels": channels} for channels in (0, 255, 1024, 1025, 65_535)),
        *({"bits": bits} for bits in (0, 1, 64, 65_535)),
        *({"data_bytes": size, "riff_bytes": size} for size in (0, 1, 2**31, 2**32 - 1)),
        {"channels": 1024, "data_bytes": 2**32 - 1},
        {"code": 3, "bits": 64},
    ],
    ids=str,
)
def test_headers(changes, tmp_path):
    """No header makes a reader take memory for what is not there."""
    path = tmp_path / "a.wav"
    path.write_bytes(wav(**changes))
    for read, result in ((read_audio, lambda found: found.samples), (LongAudio.file, np.asarray)):
        joined = SimpleNamespace(stream=lambda blocks: np.concatenate([np.zeros(0), *blocks]))
        arguments = (path,) if read is read_audio else (joined, path)
        found = read_or_refuse(read, *arguments)
        assert found is None or len(result(found)) <= 1000 * 16_000 / RATES[0]
        if "rate" in changes:
            assert found is None


def test_long_files_are_refused_before_they_fill_the_memory(tmp_path):
    """16 MB of FLAC hold 20 hours of silence: no more is decoded than may be kept."""
    data = encoded("FLAC", "PCM_16", 1, 16_000, seconds=1.0)
    assert len(read_audio(io.BytesIO(data), "it", 1.0).samples) == 16_000
    with pytest.raises(InputError, match=r"^it: longer than 0.9 s"):
        read_audio(io.BytesIO(data), "it", 0.9)


# ------------------------------------------------------------------------------------- cached audio


def cached():
    file = io.BytesIO()
    np.savez(file, samples=np.arange(100, dtype=np.int16), lengths=np.array([60, 40]))
    return file.getvalue()


@fuzz(150)
@given(data=damaged(cached()))
def test_cached_synthetic_speech(data):
    """What the corpus takes for damaged, and makes again; or the audio as it was, for what counts."""
    with bounded():
        try:
            samples, lengths = synthetic._load(io.BytesIO(data), 2)
        except MALFORMED_NPZ:
            return
    assert samples.dtype == np.int16
    assert [len(lengths), lengths.sum()] == [2, len(samples)]


# ------------------------------------------------------------------------------------- LibriSpeech trees


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A split of one utterance, its transcript file, and the table of lengths with a folder for it."""
    root = tmp_path_factory.mktemp("tree")
    chapter = root / "data" / "train" / "1" / "2"
    chapter.mkdir(parents=True)
    (chapter / "1-2-3.wav").write_bytes(wav())
    (chapter / "1-2.trans.txt").write_text("1-2-3 A B\n")
    FolderCorpus(root / "data", "train", cache_dir=root / "cache")
    (table,) = (root / "cache" / "folder").glob("*.json")
    return root, chapter / "1-2.trans.txt", table


def opened(root):
    corpus = FolderCorpus(root / "data", "train", cache_dir=root / "cache", threads=1)
    assert [len(corpus.audio(row)) for row in range(len(corpus))] == [
        utterance.num_samples for utterance in corpus.utterances
    ]
    return corpus


@fuzz(40)
@given(data=damaged(b"1-2-3 A B\n", "1-2-3 CAFÉ \u2019S\r\n\n1-2-4 X\n".encode(), b"\xff\xfe1\x00"))
def test_transcripts(data, tree):
    root, transcript, _ = tree
    transcript.write_bytes(data)
    corpus = read_or_refuse(opened, root)
    assert corpus is None or all(u.text == " ".join(u.text.split()) for u in corpus.utterances)


@fuzz(40)
@given(
    data=damaged_json({"version": "", "files": {"1/2/1-2-3.wav": [2044, 0, 1000, 1, 16_000, ""]}})
)
def test_tables_of_lengths(data, tree):
    """A damaged table is made again; it never decides what is in a file."""
    root, transcript, table = tree
    transcript.write_text("1-2-3 A B\n")
    status = next(transcript.parent.glob("*.wav")).stat()
    if isinstance(data, dict) and data.get("version") == "":
        data["version"] = json.loads(table.read_text())["version"]
        for row in (
            (data.get("files") or {}).values() if isinstance(data.get("files"), dict) else ()
        ):
            if isinstance(row, list) and row[1:2] == [0]:
                row[1] = status.st_mtime_ns
    table.write_text(json.dumps(data))
    corpus = read_or_refuse(opened, root)
    with bounded():
        table.unlink()
        sound = opened(root)
    assert corpus is None or corpus.utterances == sound.utterances
