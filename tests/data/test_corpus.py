import subprocess
import sys

import numpy as np
import pytest

from edgespeech.data.corpus import (
    Corpus,
    Skipped,
    Utterance,
    cache_folder,
    join,
    subset,
    write_atomically,
)
from edgespeech.errors import InputError


class Steps(Corpus):
    """Utterance i is i + 1 samples of the value i / 100."""

    kind = "folder"

    def __init__(self, name, count):
        self.name = name
        self.utterances = tuple(Utterance(f"{name}{i}", "s", "A", i + 1) for i in range(count))
        self.skipped = (Skipped(f"{name}-bad", "zero length"),)
        self.notes = ("one note",)

    def audio(self, index):
        return np.full(index + 1, index / 100, np.float32)


def test_join_keeps_order_audio_skipped_and_notes():
    both = join([Steps("a", 2), Steps("b", 3)])
    assert [u.id for u in both.utterances] == ["a0", "a1", "b0", "b1", "b2"]
    np.testing.assert_array_equal(both.audio(4), np.full(3, 0.02, np.float32))
    assert [s.id for s in both.skipped] == ["a-bad", "b-bad"]
    assert both.notes == ("a: one note", "b: one note")
    assert (both.kind, both.name, len(both)) == ("folder", "a+b", 5)
    assert both.hours == pytest.approx((1 + 2 + 1 + 2 + 3) / 16000 / 3600)


def test_join_of_one_is_itself_and_kinds_are_joined():
    one = Steps("a", 1)
    assert join([one]) is one
    other = Steps("b", 1)
    other.kind = "tfds"
    assert join([other, one]).kind == "folder+tfds"


def test_join_names_the_clashing_id():
    with pytest.raises(InputError, match=r"'a0' occurs in 'a' and in 'a'"):
        join([Steps("a", 1), Steps("a", 2)])
    with pytest.raises(InputError, match="no corpus"):
        join([])


def test_subset_reorders_rows():
    part = subset(Steps("a", 5), [3, 1])
    assert [u.id for u in part.utterances] == ["a3", "a1"]
    np.testing.assert_array_equal(part.audio(0), np.full(4, 0.03, np.float32))


@pytest.mark.parametrize(("rows", "message"), [([5], "row 5"), ([-1], "row -1"), ([2, 2], "twice")])
def test_subset_refuses(rows, message):
    with pytest.raises(InputError, match=message):
        subset(Steps("a", 5), rows)


def test_cache_folder_follows_argument_then_environment(monkeypatch, tmp_path):
    assert cache_folder(tmp_path, "folder") == tmp_path / "folder"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None, "folder") == tmp_path / "xdg" / "edgespeech" / "folder"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None, "folder") == tmp_path / ".cache" / "edgespeech" / "folder"


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "deep" / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_the_package_does_not_import_jax():
    code = (
        "import sys\n"
        "from edgespeech.data import audio, batching, corpus, folder, phrases, sources, synthetic\n"
        "from edgespeech.data import tfds_source, tokenizer\n"
    )
    code += "assert not {'jax', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
