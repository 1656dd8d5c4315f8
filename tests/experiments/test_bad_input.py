"""Bad input: the message alone, exit status 2, before anything is computed; or left out by name."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.interop.pretrained import save_pretrained
from experiments import lpa_librispeech
from tests.support.programs import PROGRAM, TINY_RUN, run_inside, write_tones
from tests.support.tiny import ROOT, tiny_model, tone


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A good LibriSpeech tree."""
    return write_tones(tmp_path_factory.mktemp("data"))


@pytest.fixture
def own_tree(tree, tmp_path):
    """A copy of the tree, to damage."""
    return shutil.copytree(tree, tmp_path / "data")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the program up to the point where it would begin to compute, and says so there."""

    def reached(*_):
        raise InputError("computing begins")

    monkeypatch.setattr(lpa_librispeech, "train_teacher", reached)
    monkeypatch.setattr(lpa_librispeech.asr, "evaluate", reached)

    def run(*arguments, workdir=tmp_path / "work"):
        fixed = [f"--workdir={workdir}", f"--cache_dir={tmp_path / 'cache'}"]
        return run_inside([*fixed, *TINY_RUN, *arguments], monkeypatch, capsys)

    return run


def refused(result, *parts):
    status, out, error = result
    lines = [line for line in error.splitlines() if not line.startswith("== ")]
    assert status == 2, error
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
    assert "computing begins" not in error
    return out


def accepted(result):
    """The run got as far as computing; returns what it said of the data."""
    status, out, error = result
    assert status == 2
    assert error.splitlines()[-1] == "error: computing begins"
    return out


def test_good_input_reaches_the_computing(run, tree):
    out = accepted(run(f"--data_dir={tree}"))
    assert "train: folder, 6 utterances, 0.00 h, 2 speakers" in out
    assert "test: folder, 4 utterances" in out
    assert "skipped" not in out
    assert "note" not in out


def test_missing_directory(run, tmp_path):
    refused(run(f"--data_dir={tmp_path / 'nowhere'}"), f"{tmp_path / 'nowhere'} is not a folder")


def test_a_refused_run_leaves_the_folder_free(run, tree, tmp_path):
    refused(run(f"--data_dir={tmp_path / 'nowhere'}"))
    accepted(run(f"--data_dir={tree}"))


def test_no_directory(run):
    refused(run(), "data of kind 'folder' needs a folder and none was given")


def test_missing_split(run, tree):
    result = run(f"--data_dir={tree}", "--dev_split=holdout")
    refused(result, "has no split 'holdout'", "dev, test, train")


def test_empty_split(run, own_tree):
    (own_tree / "nothing").mkdir()
    result = run(f"--data_dir={own_tree}", "--train_split=nothing")
    refused(result, f"{own_tree / 'nothing'} is empty", "SPEAKER/CHAPTER/ID.flac")


def first(tree):
    return next(iter(sorted((tree / "train").rglob("*.wav"))))


def transcripts(tree):
    return first(tree).parent / "1-1.trans.txt"


def change_text(tree, text):
    lines = transcripts(tree).read_text().splitlines()
    lines[0] = f"{first(tree).stem} {text}".strip()
    transcripts(tree).write_text("\n".join(lines) + "\n")


def skipped(run, tree, reason):
    """The first utterance alone is left out, and named with the reason."""
    name = first(tree).stem
    out = accepted(run(f"--data_dir={tree}"))
    (line,) = [line for line in out.splitlines() if line.startswith("  skipped")]
    assert line.startswith(f"  skipped {name}: ")
    assert reason in line


def test_missing_transcript(run, own_tree):
    lines = transcripts(own_tree).read_text().splitlines()
    transcripts(own_tree).write_text("\n".join(lines[1:]) + "\n")
    skipped(run, own_tree, "missing transcript")


def test_empty_transcript(run, own_tree):
    change_text(own_tree, "")
    skipped(run, own_tree, "empty transcript")


def test_unreadable_audio(run, own_tree):
    first(own_tree).write_text("this is no sound")
    skipped(run, own_tree, "unreadable audio")


def test_audio_of_zero_length(run, own_tree):
    soundfile.write(first(own_tree), np.zeros(0), 16_000)
    skipped(run, own_tree, "zero-length audio")


def test_audio_with_nan(run, own_tree):
    samples = tone("AB C")
    samples[100] = np.nan
    soundfile.write(first(own_tree), samples, 16_000, subtype="FLOAT")
    skipped(run, own_tree, "1 NaN or infinite samples")


def test_unknown_characters(run, own_tree):
    change_text(own_tree, "AB 7")
    skipped(run, own_tree, "the tokenizer lacks ['7']")


def test_target_longer_than_the_frames(run, own_tree):
    change_text(own_tree, "ABCDE" * 5)
    skipped(run, own_tree, "CTC needs 25 frames for the text, the audio has")


def test_stereo_and_other_rates_are_converted_and_said_once(run, own_tree):
    paths = sorted((own_tree / "train").rglob("*.wav"))
    for path in paths[:2]:
        samples, _ = soundfile.read(path)
        soundfile.write(path, np.stack([samples, samples], 1), 16_000)
    samples, _ = soundfile.read(paths[2])
    soundfile.write(paths[2], samples[::2], 8_000)
    out = accepted(run(f"--data_dir={own_tree}"))
    assert out.count("note: 2 files were stereo: mixed to mono") == 1
    assert out.count("note: 1 file was at 8000 Hz: resampled to 16000 Hz") == 1
    assert out.count("note: ") == 2
    assert "skipped" not in out


def test_nothing_left(run, own_tree):
    for path in (own_tree / "train").rglob("*.wav"):
        path.write_text("no sound")
    refused(run(f"--data_dir={own_tree}"), "all 6 utterances were skipped", "unreadable audio")


@pytest.mark.parametrize("name", ["file", "file/inside"])
def test_workdir_that_cannot_be_written(run, tree, tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    workdir = tmp_path / name
    result = run(f"--data_dir={tree}", workdir=workdir)
    refused(result, f"--workdir={workdir} cannot be written", "name another folder")


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--teacher_steps=0", ["teacher_steps"]),
        ("--seed=-1", ["seed"]),
        ("--optimizer.warmup=1.5", ["--optimizer.*", "warmup is 1.5: it must be in [0, 1]"]),
        ("--model.dropout=1", ["--model.*", "dropout is 1.0"]),
        ("--model.num_heads=3", ["--model.*", "does not divide"]),
        ("--model.spec_augment.time_width=-1", ["--model.spec_augment.*", "time_width is -1"]),
        ("--lpa.kernel_size=4", ["--lpa.*", "kernel_size is 4"]),
        ("--distil.kl=-1", ["--distil.*", "kl is -1"]),
        ("--batch.speed_factors=5", ["--batch.*", "speed_factors"]),
        ("--batch.speed_factors=fast", ["--batch.speed_factors holds 'fast'"]),
        ("--batch.batch_seconds=0.1", ["batch_seconds = 0.1 does not hold"]),
        ("--replaced=99", ["--replaced holds 99: give values from 1 to 3"]),
        ("--replaced=", ["--replaced is empty"]),
        ("--replaced=two", ["--replaced holds 'two'"]),
        ("--intermediate_ctc=4", ["--intermediate_ctc holds 4: give values from 1 to 3"]),
        ("--controls=magic", ["--controls holds 'magic'", "mean_only", "removed"]),
        ("--test_split=test,test", ["--test_split=test,test names a split twice"]),
        ("--test_split=test,", ["--test_split=test, names", "an empty one"]),
        ("--data=radio", ["data", "radio"]),
        ("--no_such_flag", ["no_such_flag"]),
        ("--lpa.kernel_sise=3", ["lpa.kernel_sise"]),
        ("stray", ["unexpected argument 'stray'"]),
    ],
)
def test_flags_out_of_range_or_unknown(run, tree, argument, parts):
    refused(run(f"--data_dir={tree}", argument), *parts)


def test_no_workdir(run, tree, monkeypatch, capsys):
    refused(run_inside([*TINY_RUN, f"--data_dir={tree}"], monkeypatch, capsys), "workdir")


def test_status_of_a_process():
    """The same from outside: the shell sees 2 and the message, and no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", PROGRAM, "--no_such_flag"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no_such_flag" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def teacher(tmp_path):
    """A saved model of three layers."""
    save_pretrained(tmp_path / "teacher", tiny_model(), CharTokenizer(), {})
    return tmp_path / "teacher"


def test_a_saved_teacher_sets_the_number_of_layers(run, tree, teacher):
    # The preset has twelve layers, the teacher three.
    arguments = [f"--data_dir={tree}", f"--teacher={teacher}", "--model.num_layers=12"]
    accepted(run(*arguments))
    refused(run(*arguments, "--replaced=8"), "--replaced holds 8: give values from 1 to 3")


def test_checkpoint_of_another_model(run, tree, teacher):
    path = teacher / "model.json"
    description = json.loads(path.read_text())
    description["config"]["ffn_width"] = 48
    path.write_text(json.dumps(description))
    result = run(f"--data_dir={tree}", f"--teacher={teacher}")
    refused(result, "belongs to another model", "layers.0.ffn.contract.kernel has shape")


def test_no_teacher_there(run, tree, tmp_path):
    result = run(f"--data_dir={tree}", f"--teacher={tmp_path / 'none'}")
    refused(result, f"{tmp_path / 'none'} is missing: name a folder", "or a hub id")
    (tmp_path / "none").mkdir()
    result = run(f"--data_dir={tree}", f"--teacher={tmp_path / 'none'}")
    refused(result, "holds neither model.json", "nor config.json")


def test_teacher_of_the_hub_offline(run, tree, monkeypatch):
    def snapshot_download(repo, allow_patterns):
        raise ConnectionError("no network")

    hub = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    result = run(f"--data_dir={tree}", "--teacher=some/wav2vec2")
    refused(result, "some/wav2vec2 is not a local folder", "check the name and the network")


def test_upstream_padding_needs_the_waveform(run, tree, teacher):
    arguments = [f"--data_dir={tree}", "--model.padding=upstream"]
    refused(run(*arguments), "--model.*", "choose exact, or the front end waveform")
    arguments += [f"--teacher={teacher}", "--model.front_end=waveform"]
    refused(run(*arguments), "padding is 'upstream' and model.front_end 'logmel'")


def test_several_test_splits(run, tree):
    refused(run(f"--data_dir={tree}", "--test_split=test,holdout"), "has no split 'holdout'")
    out = accepted(run(f"--data_dir={tree}", "--test_split=test,dev"))
    assert "test test: folder, 4 utterances" in out
    assert "test dev: folder, 4 utterances" in out
