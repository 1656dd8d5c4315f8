"""The enhancement program at toy size: its report against the audio it wrote, resuming, and wrong flags."""

import contextlib
import copy
import importlib
import json
import sys

import jax
import numpy as np
import pytest
import soundfile
from absl import flags
from absl.testing import flagsaver

from edgespeech.conversion.enhancement_task import EnhancementTeacher
from edgespeech.interop.pretrained import load_pretrained
from experiments import data_flags, program, recipe  # noqa: F401  # they define shared flags
from tests.conftest import CACHE
from tests.support.tiny import ToneCorpus, tone, write_librispeech

PROGRAM = "experiments.lpa_sepformer"
SHARED = {
    f"experiments.{name}"
    for name in ("data_flags", "distributed_flags", "program", "recipe", "run", "shared")
}
TOY = [
    *("--model.width=8", "--model.kernel_size=128", "--model.chunk_length=10"),
    *("--model.num_blocks=1", "--model.num_intra_layers=4"),
    *("--model.num_heads=2", "--model.ffn_width=12"),
    *("--lpa.aperiodic=2", "--lpa.periodic=1", "--lpa.positional=1"),
    *("--lpa.kernel_size=3", "--lpa.local_kernel_size=3"),
    *("--teacher_steps=3", "--sweep_steps=2", "--distil.steps_per_layer=2", "--save_every=2"),
    *("--replaced=2,4", "--controls=removed", "--data=folder", "--segment_seconds=0.6"),
    *("--batch.batch_seconds=1.3", "--mixtures.snr_db=0,10", "--test_utterances=3"),
]


class LongTones(ToneCorpus):
    """A little over a second each: enough for PESQ and STOI."""

    def audio(self, index):
        return np.concatenate([super().audio(index), tone("AB CDE DA")])[: 9 * 2000]


@contextlib.contextmanager
def own_flags():
    """The program beside those of other tests: absl has one registry, and programs share names of flags."""
    registry = vars(flags.FLAGS)
    others = dict(registry)
    registry.update(copy.deepcopy(others))
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("experiments.") and module not in SHARED:
            for flag in list(defined):
                delattr(flags.FLAGS, flag.name)
    try:
        yield importlib.import_module(PROGRAM)
    finally:
        sys.modules.pop(PROGRAM, None)
        registry.clear()
        registry.update(others)


@pytest.fixture(scope="module")
def module():
    with own_flags() as found:
        yield found


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for seed, (split, count) in enumerate((("train", 4), ("dev", 3), ("test", 5))):
        corpus = LongTones(count, seed, split)
        write_librispeech(root, split, corpus)
    return root


@pytest.fixture(scope="module")
def start(module, tree):
    """Runs the program in this process: its exit status."""

    def start(workdir, *arguments):
        compiled = jax.config.jax_compilation_cache_dir
        argv, sys.argv = sys.argv, [PROGRAM, f"--workdir={workdir}", f"--data_dir={tree}"]
        sys.argv += [f"--cache_dir={CACHE.parent / 'sepformer'}", *TOY, *arguments]
        with flagsaver.flagsaver():
            flags.FLAGS.unparse_flags()
            try:
                program.main(module.experiment)
            except SystemExit as stop:
                return stop.code or 0
            finally:
                sys.argv = argv
                jax.config.update("jax_compilation_cache_dir", compiled)
                if not flags.FLAGS.is_parsed():
                    flags.FLAGS.mark_as_parsed()

    return start


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "work"
    assert start(workdir, "--quiet") == 0
    return workdir


def report_of(workdir):
    return json.loads((workdir / "report.json").read_text())


def si_snr(estimate, clean):
    estimate, clean = estimate - estimate.mean(), clean - clean.mean()
    part = clean * (estimate @ clean) / (clean @ clean)
    # The definition's floor: after three steps an estimate may have next to nothing of the voice.
    return 10 * np.log10(np.sum(part**2) / np.sum((estimate - part) ** 2) + 1e-8)


def test_report_is_what_the_audio_says(finished):
    report, audio = report_of(finished), finished / "audio"
    rows = {"noisy": report["noisy"], "teacher": report["teacher"]}
    rows |= {f"lpa_{row['replaced']}": row for row in report["hybrids"]}
    rows |= {f"control_{row['name']}": row for row in report["controls"]}
    assert set(rows) == {"noisy", "teacher", "lpa_2", "lpa_4", "control_removed"}
    assert {path.name for path in audio.iterdir()} == {*rows, "clean", "mixtures.json"}
    for name, row in rows.items():
        values = []
        for number in range(3):
            noisy, clean, estimate = (
                soundfile.read(audio / kind / f"{number:04d}.wav")[0]
                for kind in ("noisy", "clean", name)
            )
            assert len(noisy) == len(clean) == len(estimate)
            value = si_snr(estimate, clean)
            values.append((value, value - si_snr(noisy, clean)))
        assert row["si_snr"] == pytest.approx(np.mean(values, 0)[0], abs=1e-3), name
        assert row["improvement"] == pytest.approx(np.mean(values, 0)[1], abs=1e-3), name
        assert row["ci"][0] <= row["improvement"] <= row["ci"][1]
    for row in report["hybrids"]:
        difference = row["improvement"] - report["teacher"]["improvement"]
        assert row["delta_vs_teacher"]["difference"] == pytest.approx(difference, abs=1e-6)


def test_pesq_and_stoi_are_those_of_the_audio(finished):
    pesq, pystoi = pytest.importorskip("pesq"), pytest.importorskip("pystoi")
    row, values = report_of(finished)["hybrids"][-1], []
    for number in range(3):
        clean, estimate = (
            soundfile.read(finished / "audio" / kind / f"{number:04d}.wav", dtype="float32")[0]
            for kind in ("clean", "lpa_4")
        )
        error = pesq.PesqError.RETURN_VALUES
        values.append(
            (
                pesq.pesq(16_000, clean, estimate, "wb", on_error=error),
                pystoi.stoi(clean, estimate, 16_000),
            )
        )
    scores = np.asarray(values)
    assert row["stoi"] == pytest.approx(scores[:, 1].mean(), abs=1e-6)
    found = scores[scores[:, 0] > 0, 0]
    assert len(found)
    assert row["pesq"] == pytest.approx(found.mean(), abs=1e-6)


def test_report_names_what_was_replaced(finished):
    report = report_of(finished)
    assert sorted(report["order"]) == [1, 2, 3, 4]
    by_error = sorted(report["sweep"], key=lambda row: row["mse"])
    assert report["order"] == [row["layer"] for row in by_error]
    assert [row["layers"] for row in report["hybrids"]] == [
        sorted(report["order"][:2]),
        [1, 2, 3, 4],
    ]
    assert report["controls"][0]["layers"] == [1, 2, 3, 4]
    assert report["controls"][0]["parameters"] == report["teacher"]["parameters"] - 4 * 4 * 72
    assert report["data"]["test"]["utterances"] == 3
    assert report["data"]["snr_db"] == [0.0, 10.0]
    text = (finished / "report.md").read_text()
    for row in (report["teacher"], *report["hybrids"], *report["controls"]):
        assert f"| {row['si_snr']:.2f} | {row['improvement']:.2f} |" in text
    plots = {path.name for path in (finished / "plots").iterdir()}
    assert plots == {"sweep.png", "scores.png", "losses.png", "spectrograms.png"}
    assert all(f"(plots/{name})" in text for name in plots)


@pytest.mark.parametrize(("name", "audio"), [("teacher", "teacher"), ("hybrid_4", "lpa_4")])
def test_saved_models_are_those_that_were_scored(finished, name, audio):
    model, tokenizer, about = load_pretrained(finished / name)
    assert tokenizer is None
    assert about["data"] == "folder"
    noisy, wanted = (
        soundfile.read(finished / "audio" / kind / "0000.wav", dtype="float32")[0]
        for kind in ("noisy", audio)
    )
    estimate = np.asarray(model(noisy[None], np.array([len(noisy)])).estimates[0, 0], np.float64)
    gain = noisy @ estimate / (estimate @ estimate)
    estimate *= gain / max(1.0, abs(gain) * np.abs(estimate).max())
    # Both the input and the wanted estimate are rounded to 16 bits.
    np.testing.assert_allclose(estimate, wanted, rtol=0, atol=2e-3)


def test_a_saved_teacher_is_converted_again(start, finished, tmp_path):
    assert start(tmp_path, "--quiet", f"--teacher={finished / 'teacher'}", "--controls=none") == 0
    report, wanted = report_of(tmp_path), report_of(finished)
    assert report["teacher"]["steps"] == 0
    assert report["sweep"] == wanted["sweep"]
    assert report["hybrids"] == wanted["hybrids"]


def test_interrupted_and_resumed_equals_unbroken(start, finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the second window of the hybrid with four layers."""
    workdir, lesson, calls = tmp_path / "work", EnhancementTeacher.lesson, []

    def interrupted(self, batch, frozen):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return lesson(self, batch, frozen)

    with monkeypatch.context() as patch:
        patch.setattr(EnhancementTeacher, "lesson", interrupted)
        assert start(workdir, "--quiet") == 130
    assert not (workdir / "report.json").exists()
    assert {path.stem for path in (workdir / "scores").iterdir()} == {"noisy", "teacher", "lpa_2"}
    assert start(workdir, "--quiet") == 2
    assert "holds a run already: add --resume" in capsys.readouterr().err
    assert start(workdir, "--quiet", "--resume") == 0
    before, after = report_of(finished), report_of(workdir)
    for key in before.keys() - {"stages", "command", "date"}:
        assert after[key] == before[key], key
    for path in (finished / "audio").rglob("*.wav"):
        assert (workdir / path.relative_to(finished)).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--replaced=5", "--replaced holds 5: give values from 1 to 4"),
        ("--test_split=test,dev", "names 2 splits: give one, or join them by +"),
        ("--distil.teacher=-1", "distil.teacher is -1.0: it must be at least 0"),
        ("--model.width=9", "model.width is 9: it must be even"),
        ("--mixtures.snr_db=loud", "--mixtures.snr_db holds 'loud'"),
        ("--mixtures.rt60=1,0.5", "rt60 is (1.0, 0.5)"),
        ("--segment_seconds=0", "segment_seconds"),
        ("--controls=nothing", "--controls holds 'nothing'"),
        ("--batch.batch_seconds=0.2", "batch_seconds = 0.2 does not hold"),
        ("--noise_dir=NOWHERE", "has no readable noise"),
        ("--distil.kl=1", "Unknown command line flag 'distil.kl'"),
    ],
)
def test_wrong_flags(start, tmp_path, capsys, argument, message):
    assert start(tmp_path / "work", argument.replace("NOWHERE", str(tmp_path / "none"))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("== ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (tmp_path / "work" / "config.json").exists()
