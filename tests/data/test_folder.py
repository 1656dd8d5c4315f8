import os

import numpy as np
import pytest
import soundfile

from edgespeech.data import folder
from edgespeech.data.folder import FolderCorpus, normalise_text
from edgespeech.errors import InputError


def noise(seed, count=1600):
    return np.random.default_rng(seed).integers(-9000, 9000, count).astype(np.int16)


def add(root, speaker, chapter, number, text, suffix="flac", samples=None):
    """Write one utterance; text None leaves its transcript out, samples "none" its audio."""
    place = root / speaker / chapter
    place.mkdir(parents=True, exist_ok=True)
    id = f"{speaker}-{chapter}-{number:04d}"
    if text is not None:
        with open(place / f"{speaker}-{chapter}.trans.txt", "a", encoding="utf-8") as file:
            file.write(f"{id} {text}\n")
    if not isinstance(samples, str):
        data = noise(number, 1600 + number) if samples is None else samples
        soundfile.write(place / f"{id}.{suffix}", data, 16000)
    return place / f"{id}.{suffix}"


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "data" / "train"
    add(root, "20", "7", 1, "second speaker as a string")
    add(root, "103", "2", 5, "it\u2019s  a\tquestion", "wav")
    add(root, "103", "2", 3, "HELLO WORLD")
    return tmp_path / "data"


def test_utterances_in_order_with_text_speaker_and_exact_audio(tree, tmp_path):
    corpus = FolderCorpus(tree, "train", cache_dir=tmp_path)
    assert [(u.id, u.speaker, u.text, u.num_samples) for u in corpus.utterances] == [
        ("103-2-0003", "103", "HELLO WORLD", 1603),
        ("103-2-0005", "103", "IT'S A QUESTION", 1605),
        ("20-7-0001", "20", "SECOND SPEAKER AS A STRING", 1601),
    ]
    for index, number in enumerate((3, 5, 1)):
        expected = noise(number, 1600 + number) / np.float32(32768)
        np.testing.assert_array_equal(corpus.audio(index), expected)
        np.testing.assert_array_equal(corpus.audio(index), expected)
    assert (corpus.kind, corpus.name, corpus.skipped, corpus.notes) == ("folder", "train", (), ())
    assert corpus.hours == pytest.approx((1603 + 1605 + 1601) / 16000 / 3600)


def test_text_is_normalised_without_loss():
    assert normalise_text(" don\u2018t \u02bcstop\u00a0 now 7! ") == "DON'T 'STOP NOW 7!"


def test_every_fault_is_skipped_and_named(tree, tmp_path):
    root = tree / "train"
    add(root, "5", "1", 1, None)
    add(root, "5", "1", 2, "NO AUDIO", samples="none")
    add(root, "5", "1", 3, " ")
    add(root, "5", "1", 4, "DAMAGED").write_bytes(b"fLaC no more")
    add(root, "5", "1", 5, "NOTHING", "wav", samples=np.zeros(0, np.int16))
    path = add(root, "5", "1", 6, "NAN", "wav")
    soundfile.write(path, np.asarray([0.1, np.nan]), 16000, subtype="FLOAT")
    corpus = FolderCorpus(tree, "train", cache_dir=tmp_path)
    assert len(corpus) == 3
    reasons = {s.id: s.reason for s in corpus.skipped}
    assert list(reasons) == [f"5-1-000{i}" for i in range(1, 7)]
    for number, start in enumerate(
        [
            "missing transcript",
            "missing audio",
            "empty transcript",
            "unreadable",
            "zero-length",
            "1 NaN",
        ],
        start=1,
    ):
        assert reasons[f"5-1-000{number}"].startswith(start)
    again = FolderCorpus(tree, "train", cache_dir=tmp_path)
    assert again.skipped == corpus.skipped


def test_repeated_ids_and_unreadable_transcripts(tree, tmp_path):
    root = tree / "train"
    add(root, "20", "7", 1, None, "wav", samples=np.zeros(50, np.int16))
    other = root / "20" / "8"
    other.mkdir()
    (other / "20-8.trans.txt").write_bytes("20-8-0001 CAF\u00c9".encode("latin-1"))
    soundfile.write(other / "20-8-0001.flac", noise(0), 16000)
    soundfile.write(other / "103-2-0003.flac", noise(0), 16000)
    corpus = FolderCorpus(tree, "train", cache_dir=tmp_path)
    assert len(corpus) == 3
    assert corpus.utterances[2].num_samples == 1601  # the FLAC file comes before the WAV file
    assert any("1 file was left out for a twin" in note for note in corpus.notes)
    reasons = {s.id: s.reason for s in corpus.skipped}
    assert "unreadable transcripts" in reasons[os.path.join("20", "8", "20-8.trans.txt")]
    assert reasons["20-8-0001"] == "missing transcript"
    assert "second audio file" in reasons["103-2-0003"]


def test_conversions_are_noted(tree, tmp_path):
    root = tree / "train"
    stereo = np.stack([noise(1), noise(2)], axis=1)
    add(root, "5", "1", 1, "STEREO", "wav", samples=stereo)
    soundfile.write(add(root, "5", "1", 2, "SLOW", "wav"), noise(0, 4000), 8000)
    corpus = FolderCorpus(tree, "train", cache_dir=tmp_path)
    assert corpus.notes == (
        "1 file was stereo: mixed to mono",
        "1 file was at 8000 Hz: resampled to 16000 Hz",
    )
    assert [u.num_samples for u in corpus.utterances][-2:] == [1600, 8000]
    np.testing.assert_allclose(corpus.audio(3), stereo.mean(axis=1) / 32768, atol=0.6 / 32768)
    assert FolderCorpus(tree, "train", cache_dir=tmp_path).notes == corpus.notes


def test_the_table_is_cached_by_path_size_and_time(tree, tmp_path, monkeypatch):
    first = FolderCorpus(tree, "train", cache_dir=tmp_path)
    decoded = []
    original = folder.read_audio
    monkeypatch.setattr(
        folder, "read_audio", lambda path: decoded.append(path.name) or original(path)
    )
    assert FolderCorpus(tree, "train", cache_dir=tmp_path).utterances == first.utterances
    assert decoded == []
    path = add(tree / "train", "103", "2", 3, None, samples=noise(9, 2000))
    os.utime(path, ns=(1, 1))
    changed = FolderCorpus(tree, "train", cache_dir=tmp_path)
    assert decoded == ["103-2-0003.flac"]
    assert changed.utterances[0].num_samples == 2000
    decoded.clear()
    os.utime(tree / "train" / "103" / "2" / "103-2-0005.wav", ns=(5, 5))
    FolderCorpus(tree, "train", cache_dir=tmp_path)
    assert decoded == ["103-2-0005.wav"]
    decoded.clear()
    for table in (tmp_path / "folder").iterdir():
        table.write_text('{"version": 1')
    repaired = FolderCorpus(tree, "train", cache_dir=tmp_path)
    assert len(decoded) == 3
    assert repaired.utterances == changed.utterances
    assert "damaged" in repaired.notes[0]


def test_an_unwritable_cache_is_a_note(tree, tmp_path):
    (tmp_path / "folder").write_text("a file where the folder should be")
    corpus = FolderCorpus(tree, "train", cache_dir=tmp_path)
    assert len(corpus) == 3
    assert any("could not be kept" in note for note in corpus.notes)


def test_memory_is_bounded_and_changes_nothing(tree, tmp_path, monkeypatch):
    kept = FolderCorpus(tree, "train", cache_dir=tmp_path)
    FolderCorpus(tree, "train", cache_dir=tmp_path)
    small = FolderCorpus(tree, "train", cache_dir=tmp_path, cache_mb=2 * 1604 / 2**20)
    expected = [kept.audio(i) for i in range(3)]
    for _ in range(2):
        for index in range(3):
            np.testing.assert_array_equal(small.audio(index), expected[index])
    assert len(small._memory) == 1
    monkeypatch.setattr(folder, "read_audio", None)
    for index in range(3):
        np.testing.assert_array_equal(kept.audio(index), expected[index])


def test_a_file_that_changes_under_an_open_corpus(tree, tmp_path):
    corpus = FolderCorpus(tree, "train", cache_dir=tmp_path, cache_mb=0)
    add(tree / "train", "20", "7", 1, None, samples=noise(0, 300))
    with pytest.raises(InputError, match="300 samples, but 1601 when the corpus was opened"):
        corpus.audio(2)


def test_wrong_folders_are_explained(tree, tmp_path):
    add(tree / "dev", "1", "1", 1, "HELLO")
    (tree / "hollow").mkdir()
    (tree / "other" / "thing").mkdir(parents=True)
    add(tree / "mute", "1", "1", 1, "HELLO", samples="none")
    add(tree / "broken", "1", "1", 1, "HELLO").write_bytes(b"x")

    def message(data_dir, split):
        with pytest.raises(InputError) as caught:
            FolderCorpus(data_dir, split, cache_dir=tmp_path / "cache")
        return str(caught.value)

    assert "is not a folder" in message(tmp_path / "missing", "train")
    text = message(tree, "test")
    assert "no split 'test'" in text
    assert "splits found" in text
    assert all(name in text for name in ("train", "dev"))
    assert "hollow is empty" in message(tree, "hollow")
    assert "is not a LibriSpeech tree" in message(tree, "other")
    assert "transcripts and no audio" in message(tree, "mute")
    assert "all 1 utterances were skipped (1 x unreadable" in message(tree, "broken")
    assert "'train'" in message(tree / "train", "train")
    assert f"use the data folder {str(tree)!r}" in message(tree / "train", "train")
    assert f"use {str(tree)!r} as the data folder" in message(tmp_path, "train")
    assert "is not a LibriSpeech tree" in message(tree / "other", "train")
