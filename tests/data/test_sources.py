import numpy as np
import pytest
import soundfile

from edgespeech.data.sources import open_corpus
from edgespeech.data.synthetic import SyntheticConfig
from edgespeech.errors import InputError

TINY = SyntheticConfig(num_train=3, num_dev=2, num_test=2)


def make_split(root, split, chapter, count=2):
    folder = root / split / "1" / chapter
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        soundfile.write(folder / f"1-{chapter}-{i}.wav", np.full(1600 + i, 0.25), 16000)
        lines.append(f"1-{chapter}-{i} HELLO\n")
    (folder / f"1-{chapter}.trans.txt").write_text("".join(lines))


@pytest.fixture
def dirs(tmp_path):
    for name, split, chapter in [("a", "train", "10"), ("a", "more", "11"), ("b", "other", "12")]:
        make_split(tmp_path / name, split, chapter)
    return tmp_path


def test_folder_splits_and_own_splits(dirs, tmp_path):
    folders = [str(dirs / "a"), f"{dirs / 'b'}:other"]
    corpus = open_corpus("folder", "train+more", data_dir=folders, cache_dir=tmp_path / "cache")
    assert corpus.name == "train+more+other"
    assert [u.id for u in corpus.utterances] == [
        f"1-{chapter}-{i}" for chapter in (10, 11, 12) for i in (0, 1)
    ]
    np.testing.assert_array_equal(corpus.audio(5), np.full(1601, 0.25))
    own = [f"{dirs / 'a'}:more+train"]
    assert (
        open_corpus("folder", "x", data_dir=own, cache_dir=tmp_path / "cache").name == "more+train"
    )


def test_a_colon_in_the_folder_is_no_split(tmp_path):
    make_split(tmp_path / "a:b", "train", "10")
    corpus = open_corpus(
        "folder", "train", data_dir=[str(tmp_path / "a:b")], cache_dir=tmp_path / "cache"
    )
    assert len(corpus) == 2


def test_every_folder_must_hold_the_split(dirs, tmp_path):
    with pytest.raises(InputError, match=r"no split 'train'.*other"):
        open_corpus(
            "folder", "train", data_dir=[str(dirs / "a"), str(dirs / "b")], cache_dir=tmp_path
        )


def test_one_split_twice_is_refused(dirs, tmp_path):
    with pytest.raises(InputError, match="1-10-0"):
        open_corpus("folder", "train+train", data_dir=[str(dirs / "a")], cache_dir=tmp_path)


def test_synthetic(tmp_path):
    corpus = open_corpus("synthetic", "dev+test", synthetic=TINY, cache_dir=tmp_path)
    assert [u.id for u in corpus.utterances] == [
        "synthetic-dev-00000",
        "synthetic-dev-00001",
        "synthetic-test-00000",
        "synthetic-test-00001",
    ]
    assert (corpus.kind, corpus.name) == ("synthetic", "synthetic-dev+synthetic-test")


@pytest.mark.parametrize(
    ("kind", "split", "message"),
    [
        ("wav", "train", "'wav'"),
        ("folder", "train", "needs a folder"),
        ("tfds", "train", "needs a folder"),
        ("synthetic", "train+", "empty name"),
        ("synthetic", "validation", "'validation'"),
    ],
)
def test_errors(kind, split, message, tmp_path):
    with pytest.raises(InputError, match=message):
        open_corpus(kind, split, cache_dir=tmp_path)
