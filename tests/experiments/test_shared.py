"""What runs share: by which flags, and whose files."""

import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from edgespeech.errors import InputError
from experiments import lpa_librispeech, shared

FLAGS = flags.FLAGS
PARTS = ("labels", "score", "sweep")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [lpa_librispeech.__name__])
    with flagsaver.flagsaver(workdir=str(tmp_path / "one"), data="folder", data_dir=["data"]):
        if not FLAGS.is_parsed():
            FLAGS.mark_as_parsed()
        FLAGS.teacher, FLAGS.shared = "runs/teacher", str(tmp_path / "shared")
        yield tmp_path / "shared"


def places(**changes):
    with flagsaver.flagsaver(**changes):
        return [shared.place(name) for name in PARTS]


@pytest.mark.parametrize(
    ("flag", "value", "moved"),
    [
        ("workdir", "elsewhere", ()),
        ("distil.kl", 0.5, ()),
        ("distil.joint_steps", 9, ()),
        ("order", "random", ()),
        ("replaced", ["1"], ()),
        ("controls", ["none"], ()),
        ("save_every", 7, ()),
        ("lpa.aperiodic", 3, ("sweep",)),
        ("distil.init", "random", ("sweep",)),
        ("distil.curriculum", False, ("sweep",)),
        ("sweep_steps", 7, ("sweep",)),
        ("seed", 3, ("sweep",)),
        ("train_split", "more", ("sweep",)),
        ("batch.batch_seconds", 9.0, ("sweep",)),
        ("test_split", "other", ("score",)),
        ("more_train", ["x:y"], ("labels", "sweep")),
        ("teacher", "another", PARTS),
        ("data_dir", ["other"], PARTS),
        ("model.padding", "upstream", PARTS),
    ],
)
def test_a_part_moves_with_the_flags_that_it_depends_on(folder, flag, value, moved):
    before, after = places(), places(**{flag: value})
    assert {path.parent for path in before} == {folder}
    found = [name for name, a, b in zip(PARTS, before, after, strict=True) if a != b]
    assert found == [name for name in PARTS if name in moved]


def test_synthetic_voices_depend_on_the_seed(folder):
    before, after = places(data="synthetic"), places(data="synthetic", seed=1)
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_without_the_flag_nothing_is_shared(folder, tmp_path):
    with flagsaver.flagsaver(shared=None), shared.part("score", tmp_path / "one", "a/*"):
        assert shared.place("sweep") is None
    with flagsaver.flagsaver(teacher=None), pytest.raises(InputError, match="runs of one teacher"):
        shared.place("score")


def test_the_first_run_leaves_its_files_and_later_ones_find_them(folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    (one / "steps" / "7").mkdir(parents=True)
    with shared.part("sweep", one, "steps"):
        assert not folder.exists()
        (one / "steps" / "7" / "state").write_text("first")
        (one / "other").write_text("x")
    two.mkdir()
    with shared.part("sweep", two, "steps"):
        assert (two / "steps" / "7" / "state").read_text() == "first"
        assert not (two / "other").exists()
        (two / "steps" / "7" / "state").write_text("second")
    # What is there stays, and so does what a run has of its own.
    with shared.part("sweep", two, "steps"):
        assert (two / "steps" / "7" / "state").read_text() == "second"
    assert (shared.place("sweep") / "steps" / "7" / "state").read_text() == "first"
    assert [path.name for path in folder.iterdir()] == [shared.place("sweep").name]


def test_a_run_that_fails_leaves_nothing(folder, tmp_path):
    (tmp_path / "one").mkdir()

    def fail():
        with shared.part("score", tmp_path / "one", "*.jsonl"):
            (tmp_path / "one" / "teacher.jsonl").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not folder.exists()
