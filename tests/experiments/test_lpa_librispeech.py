"""The whole program in processes of its own: a run, its report, and what a second start may do."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest
from flax import nnx

from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.data.folder import FolderCorpus
from edgespeech.evaluation.decode import GreedyDecoder
from edgespeech.interop.pretrained import load_pretrained
from edgespeech.models.wav2vec2 import Wav2Vec2Config
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA
from experiments.lpa_librispeech import model_settings
from tests.support.programs import PROGRAM, TINY_RUN, write_tones
from tests.support.tiny import ROOT


@dataclasses.dataclass
class Run:
    """A finished run."""

    workdir: Path
    data: Path
    command: list
    stdout: str
    stderr: str

    def start(self, *arguments):
        """Starts the program again."""
        return subprocess.run([*self.command, *arguments], capture_output=True, text=True, cwd=ROOT)

    @property
    def report(self):
        return json.loads((self.workdir / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The program, run once from the beginning to the end."""
    root = tmp_path_factory.mktemp("program")
    data = write_tones(root / "data")
    command = [sys.executable, "-m", PROGRAM, f"--workdir={root / 'work'}", f"--data_dir={data}"]
    command += [f"--cache_dir={root / 'cache'}", *TINY_RUN]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return Run(root / "work", data, command, done.stdout, done.stderr)


def test_report_has_what_it_promises(finished):
    report = finished.report
    assert report["data"]["kind"] == "folder"
    assert report["data"]["train"]["utterances"] == 6
    assert report["data"]["test"]["speakers"] == 2
    assert report["data"]["test"]["name"] == "test"
    assert "splits" not in report["data"]
    assert "splits" not in report["teacher"]
    assert {"wer", "ci", "cer", "parameters", "steps", "config"} <= report["teacher"].keys()
    assert report["teacher"]["steps"] == 4
    assert report["teacher"]["config"]["width"] == 16
    assert [row["layer"] for row in report["sweep"]] == [1, 2, 3]
    for row in report["sweep"]:
        assert row["mse"] > 0
        assert row["relative_mse"] == pytest.approx(row["mse"] / row["variance"])
    # Ascending error is the order, and the hybrids follow it.
    errors = {row["layer"]: row["mse"] for row in report["sweep"]}
    assert report["order"] == sorted(errors, key=errors.get)
    assert [row["replaced"] for row in report["hybrids"]] == [1, 2]
    for row in report["hybrids"]:
        assert row["layers"] == sorted(report["order"][: row["replaced"]])
        difference = row["delta_vs_teacher"]["difference"]
        assert difference == pytest.approx(row["wer"] - report["teacher"]["wer"])
    assert [row["name"] for row in report["controls"]] == ["sliding_window", "removed"]
    for row in report["controls"]:
        assert row["replaced"] == 2
        assert row["layers"] == report["hybrids"][-1]["layers"]
    # Attention gone: 4 linear layers of width 16 in each of the two.
    removed = report["controls"][1]
    assert report["teacher"]["parameters"] - removed["parameters"] == 2 * 4 * (16 * 16 + 16)
    assert {"jax", "flax", "python", "edgespeech"} <= report["versions"].keys()
    assert report["device"]["platform"] == "cpu"
    assert report["seeds"] == {"seed": 0}
    names = [stage["name"] for stage in report["stages"]]
    assert names[:4] == ["data", "teacher", "teacher evaluation", "sweep"]
    assert all(stage["seconds"] > 0 for stage in report["stages"])
    assert report["command"].startswith(f"python -m {PROGRAM} ")


@pytest.mark.parametrize(("padding", "named"), [("exact", set()), ("upstream", {"padding"})])
def test_settings_of_a_teacher_are_those_of_older_checkpoints(padding, named):
    config = Wav2Vec2Config(padding=padding)
    settings = model_settings(config)
    fields = {field.name for field in dataclasses.fields(config)}
    assert settings.keys() == fields - {"padding"} | named
    assert json.loads(json.dumps(settings)) == settings
    assert settings["spec_augment"]["time_width"] == config.spec_augment.time_width


def hypotheses(finished, name):
    path = finished.workdir / "hypotheses" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_word_error_rates_are_those_of_the_hypotheses(finished):
    report = finished.report
    rows = {"teacher": report["teacher"]}
    rows |= {f"lpa_{row['replaced']}": row for row in report["hybrids"]}
    rows |= {f"control_{row['name']}": row for row in report["controls"]}
    for name, row in rows.items():
        lines = hypotheses(finished, name)
        assert len(lines) == 4
        wer = jiwer.wer([x["reference"] for x in lines], [x["hypothesis"] for x in lines])
        assert row["wer"] == pytest.approx(wer), name


@pytest.mark.parametrize("name", ["teacher", "hybrid_1", "hybrid_2"])
def test_saved_models_are_those_that_were_scored(finished, name):
    model, tokenizer, about = load_pretrained(finished.workdir / name)
    corpus = FolderCorpus(finished.data, "test", cache_dir=finished.workdir.parent / "cache")
    source = BatchSource(corpus, None, BatchConfig(batch_seconds=4.6, num_buckets=1))
    graphdef, state = nnx.split(model)
    result = GreedyDecoder(graphdef, tokenizer).score(state, source)
    scored = hypotheses(finished, name.replace("hybrid", "lpa"))
    assert [row.hypothesis for row in result.utterances] == [row["hypothesis"] for row in scored]
    assert about["data"] == "folder"
    replaced = about.get("replaced", [])
    for number, layer in enumerate(model.layers, 1):
        assert isinstance(layer.mixer, LPA if number in replaced else SelfAttention)
    count = 0 if name == "teacher" else int(name[-1])
    assert replaced == finished.report["order"][:count]


def test_plots_are_png(finished):
    plots = {path.name: path.read_bytes() for path in (finished.workdir / "plots").iterdir()}
    pulses = {f"pulses_layer{layer:02d}.png" for layer in finished.report["hybrids"][-1]["layers"]}
    assert plots.keys() == {"sweep.png", "wer.png", "losses.png"} | pulses
    for name, content in plots.items():
        assert content.startswith(b"\x89PNG\r\n\x1a\n"), name
        assert len(content) > 5000, name
    text = (finished.workdir / "report.md").read_text()
    assert all(f"plots/{name}" in text for name in plots)


def test_terminal(finished):
    assert "train: folder, 6 utterances" in finished.stdout
    wer = finished.report["teacher"]["wer"]
    assert f"teacher: WER {wer:.2%}" in finished.stdout
    assert "order of replacement: " in finished.stdout
    stages = [line for line in finished.stderr.splitlines() if line.startswith("== ")]
    assert stages[0] == "== data"
    assert stages[-1] == "== control removed"
    assert "Traceback" not in finished.stderr


def test_second_start_without_resume_is_refused(finished):
    before = (finished.workdir / "report.json").read_bytes()
    done = finished.start()
    assert done.returncode == 2
    assert "holds a run already: add --resume" in done.stderr
    assert (finished.workdir / "report.json").read_bytes() == before


def test_resume_with_other_flags_is_refused(finished):
    done = finished.start("--resume", "--sweep_steps=7", "--lpa.aperiodic=3")
    assert done.returncode == 2
    assert "lpa.aperiodic was 2, is 3; sweep_steps was 3, is 7" in done.stderr


def test_resume_of_a_finished_run_changes_nothing(finished):
    before = finished.report
    # A run that is older than the flag: not named in its settings.
    config = finished.workdir / "config.json"
    settings = json.loads(config.read_text())
    assert settings.pop("model.padding") is None
    config.write_text(json.dumps(settings))
    weights = {path: path.read_bytes() for path in finished.workdir.rglob("*.safetensors")}
    metrics = {path: path.read_bytes() for path in finished.workdir.rglob("*.jsonl")}
    assert len(weights) == 3
    (finished.workdir / "report.json").unlink()
    done = finished.start("--resume", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    after = finished.report
    for key in before.keys() - {"stages", "command", "date"}:
        assert after[key] == before[key], key
    # hybrid_1 too, though the newest checkpoint has two layers replaced.
    assert {path: path.read_bytes() for path in weights} == weights
    assert {path: path.read_bytes() for path in metrics} == metrics


def test_metrics_of_every_stage(finished):
    stages = {path.stem for path in (finished.workdir / "metrics").iterdir()}
    kinds = ("lpa", "sliding_window")
    expected = {"teacher", "convert_removed"} | {
        f"{stage}_{kind}" for stage in ("sweep", "convert") for kind in kinds
    }
    assert stages == expected
    for name in stages:
        rows = (finished.workdir / "metrics" / f"{name}.jsonl").read_text().splitlines()
        losses = [json.loads(row)["loss"] for row in rows]
        assert np.isfinite(losses).all()
