"""The whole program on a tiny Moonshine and noise, in a process of its own: its flags are those of another program."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.data.folder import FolderCorpus
from edgespeech.evaluation.decode import Seq2SeqDecoder
from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.nn.lpa import LPA
from edgespeech.nn.rotary import RotarySelfAttention
from tests.support.moonshine_conversion import NoiseCorpus, letters, talkative_moonshine
from tests.support.tiny import ROOT, write_librispeech

PROGRAM = "experiments.lpa_moonshine"
RUN = [
    *("--data=folder", "--replaced=1,2", "--controls=sliding_window", "--window=2"),
    *("--lpa.aperiodic=2", "--lpa.periodic=1", "--lpa.positional=1"),
    *("--lpa.kernel_size=3", "--lpa.local_kernel_size=3"),
    *("--sweep_steps=3", "--distil.steps_per_layer=3", "--save_every=2"),
    *("--batch.batch_seconds=1.3", "--batch.num_buckets=1", "--batch.speed_factors=1"),
]
BATCH = BatchConfig(batch_seconds=2.6, num_buckets=1)


@dataclasses.dataclass
class Run:
    """A finished run."""

    root: Path
    stdout: str
    report: dict

    def start(self, *arguments, program=PROGRAM):
        command = [sys.executable, "-m", program, f"--cache_dir={self.root / 'cache'}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def write_data(root):
    """Noise; only the test split has transcripts, and they are what the teacher hears."""
    for seed, (split, count) in enumerate((("train", 10), ("dev", 4), ("test", 6))):
        write_librispeech(root, split, NoiseCorpus(count, seed, split))
    graphdef, state = nnx.split(talkative_moonshine())
    source = BatchSource(FolderCorpus(root, "test"), None, BATCH)
    heard = Seq2SeqDecoder(graphdef, letters()).score(state, source)
    for path in root.rglob("*.trans.txt"):
        path.unlink()
    for row in heard.utterances:
        speaker, chapter, _ = row.id.split("-")
        with (root / "test" / speaker / chapter / f"{speaker}-{chapter}.trans.txt").open("a") as f:
            f.write(f"{row.id} {row.hypothesis}\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("moonshine")
    write_data(root / "data")
    save_pretrained(root / "teacher", talkative_moonshine(), letters(), {"notes": ["tiny"]})
    run = Run(root, "", {})
    done = run.start(*arguments(root))
    assert done.returncode == 0, done.stderr
    run.stdout = done.stdout
    run.report = json.loads((root / "work" / "report.json").read_text())
    return run


def arguments(root, work="work"):
    return [
        *(
            f"--workdir={root / work}",
            f"--data_dir={root / 'data'}",
            f"--teacher={root / 'teacher'}",
            f"--shared={root / 'shared'}",
        ),
        *RUN,
    ]


def labels_path(run):
    (path,) = (run.root / "shared").glob("labels-*/labels.jsonl")
    return path


def test_the_teacher_against_itself_makes_no_error(finished):
    assert finished.report["teacher"]["wer"] == 0
    assert finished.report["teacher"]["cer"] == 0
    lines = (finished.root / "work" / "hypotheses" / "teacher.jsonl").read_text().splitlines()
    texts = [json.loads(line)["hypothesis"] for line in lines]
    assert len(set(texts)) > 1
    assert "teacher: WER 0.00%" in finished.stdout


def test_report(finished):
    report = finished.report
    assert report["teacher"]["config"]["rotary_factor"] == 0.8
    assert [row["layer"] for row in report["sweep"]] == [1, 2]
    for row in report["sweep"]:
        assert row["relative_mse"] == pytest.approx(row["mse"] / row["variance"])
    errors = {row["layer"]: row["mse"] for row in report["sweep"]}
    assert report["order"] == sorted(errors, key=errors.get)
    assert [row["replaced"] for row in report["hybrids"]] == [1, 2]
    for row in report["hybrids"]:
        assert row["delta_vs_teacher"]["difference"] == pytest.approx(row["wer"])
    (control,) = report["controls"]
    assert control["name"] == "sliding_window"
    assert control["parameters"] == report["teacher"]["parameters"]
    assert report["notes"][0] == "teacher: tiny"
    plots = {path.name for path in (finished.root / "work" / "plots").iterdir()}
    assert {"sweep.png", "wer.png", "losses.png", "pulses_layer01.png"} <= plots


def test_labels_are_what_the_teacher_hears(finished):
    lines = labels_path(finished).read_text().splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines)}
    source = BatchSource(
        FolderCorpus(finished.root / "data", "train", require_text=False), None, BATCH
    )
    graphdef, state = nnx.split(talkative_moonshine())
    decoder, count = Seq2SeqDecoder(graphdef, letters()), 0
    for batch in source.eval_batches():
        for index, text in zip(batch.index, decoder.token_texts(state, batch), strict=True):
            if index >= 0:
                row = rows[source.corpus.utterances[index].id]
                assert (row["tokens"], row["ended"]) == (text.tokens, text.ended)
                count += 1
    assert count == len(rows) == 10
    ended = [row for row in rows.values() if row["ended"]]
    data = finished.report["data"]
    assert data["labels"] == {
        "kind": "teacher",
        "utterances": len(ended),
        "tokens": sum(len(row["tokens"]) for row in ended),
    }
    assert data["train"]["utterances"] == len(ended)


def test_hybrids_are_scored_the_same_by_the_other_program(finished):
    folder = finished.root / "work" / "hybrid_1"
    model, tokenizer, about = load_pretrained(folder)
    assert tokenizer.pieces == letters().pieces
    kinds = [type(layer.mixer) for layer in model.layers]
    assert about["replaced"] == finished.report["order"][:1]
    for number, kind in enumerate(kinds, 1):
        assert kind is (LPA if number in about["replaced"] else RotarySelfAttention)
    done = finished.start(
        f"--checkpoint={folder}",
        f"--data_dir={finished.root / 'data'}",
        "--split=test",
        program="experiments.evaluate",
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((folder / "evaluations" / "folder_test.json").read_text())
    assert facts["score"]["wer"] == pytest.approx(finished.report["hybrids"][0]["wer"])
    assert facts["padding"] == "exact"


def test_a_resumed_run_equals_an_unbroken_one(finished):
    """What a run leaves that is killed in the second window of its conversion: the sweep, step 4 of 6."""
    root = finished.root
    shutil.copytree(root / "work", root / "broken")
    broken = root / "broken"
    for name in ("hybrid_1", "hybrid_2", "hypotheses", "plots"):
        shutil.rmtree(broken / name)
    for name in ("lpa", "sliding_window"):
        for path in (broken / "checkpoints" / f"convert_{name}").iterdir():
            if path.name != "4":
                shutil.rmtree(path)
    (broken / "report.json").unlink()
    done = finished.start(*arguments(root, "broken"), "--resume", "--quiet")
    assert done.returncode == 0, done.stderr
    after = json.loads((broken / "report.json").read_text())
    for key in ("data", "teacher", "sweep", "order", "controls", "notes"):
        assert after[key] == finished.report[key], key
    assert after["hybrids"][1] == finished.report["hybrids"][1]
    name = "hybrid_2/weights.safetensors"
    assert (broken / name).read_bytes() == (root / "work" / name).read_bytes()


def test_a_row_of_an_ablation_shares_labels_and_sweep(finished):
    """Another seed's test set is the same; what is shared is not worked out again."""
    labels = labels_path(finished)
    before = labels.read_bytes()
    changed = ["--controls=none", "--distil.kl=0", "--distil.joint_steps=2"]
    changed += ["--distil.steps_per_layer=2", "--max_test_hours=0.0004"]
    done = finished.start(*arguments(finished.root, "row"), *changed)
    assert done.returncode == 0, done.stderr
    assert labels.read_bytes() == before
    row = finished.root / "row"
    report, first = json.loads((row / "report.json").read_text()), finished.report
    assert report["sweep"] == first["sweep"]
    stages = {path.stem for path in (row / "metrics").iterdir()}
    assert stages == {"convert_lpa"}
    # Metrics are written where `advance` ends: after one window of 2, and after the other with 2 joint steps.
    metrics = (row / "metrics" / "convert_lpa.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 5]
    # 1.44 s of test audio; a score on fewer utterances is no other run's.
    assert 0 < report["data"]["test"]["hours"] <= 0.0004 < first["data"]["test"]["hours"]
    lines = (row / "hypotheses" / "teacher.jsonl").read_text().splitlines()
    assert len(lines) == report["data"]["test"]["utterances"] < first["data"]["test"]["utterances"]
    assert len(list((finished.root / "shared").glob("score-*"))) == 2
    assert len(list((finished.root / "shared").glob("sweep-*"))) == 1
    # Sweep of 3 and two windows of 2, the joint steps with the last; all windows of 3 in the first run.
    assert [hybrid["updates"] for hybrid in report["hybrids"]] == [5, 9]
    assert [hybrid["updates"] for hybrid in first["hybrids"]] == [6, 9]
    assert first["controls"][0]["updates"] == 9


def test_without_the_wheel(tmp_path):
    """A machine without the extra, and no flag but --workdir."""
    code = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'moonshine_cpp' else find(n, *a)\n"
        f"sys.argv = ['lpa_moonshine', '--workdir={tmp_path / 'work'}']\n"
        f"runpy.run_module('{PROGRAM}', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "pip install 'edgespeech[moonshine]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "work").exists()
