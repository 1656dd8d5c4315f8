"""The program on exits at toy size: its report computed again, a broken run resumed, and wrong flags."""

import dataclasses
import json
from pathlib import Path

import jiwer
import numpy as np
import pytest
from safetensors.numpy import load_file

from edgespeech.data.folder import FolderCorpus
from edgespeech.data.tokenizer import ctc_collapse
from edgespeech.inference.exit_policy import load_policy
from edgespeech.inference.exit_predictor import FEATURES, load_predictor
from edgespeech.interop.pretrained import load_pretrained
from edgespeech.models.exit_macs import exit_macs
from tests.support.apart import run_apart
from tests.support.tiny import ToneCorpus, write_librispeech

PROGRAM = "experiments.splitformer_librispeech"
NAMES = ("ee_baseline", "splitformer", "wav2vec2")
SIZES = {
    "width": 8,
    "num_exits": 2,
    "num_heads": 1,
    "ffn_width": 8,
    "conv_kernel": 3,
    "num_mels": 20,
}
ENCODER_SIZES = {
    "width": 8,
    "num_layers": 4,
    "num_heads": 1,
    "ffn_width": 8,
    "num_mels": 20,
    "front_channels": 8,
    "conv_blocks": 0,
    "position_kernel": 3,
    "position_groups": 8,
}
FLAGS = [
    f"--models={','.join(NAMES)}",
    "--exit_heads=own",
    *(f"--model.{name}={value}" for name, value in SIZES.items()),
    *(f"--wav2vec2.{name}={value}" for name, value in ENCODER_SIZES.items()),
    *("--steps=4", "--save_every=2", "--n_best=2", "--data=folder", "--tokenizer=char"),
    *("--batch.batch_seconds=2.3", "--batch.num_buckets=1", "--batch.speed_factors=1"),
]
REFUSED = [
    (
        ["--models=tiny"],
        "--models holds 'tiny': choose from ee_baseline, splitformer, all_exits, wav2vec2",
    ),
    (["--wav2vec2.num_layers=5"], "5 layers cannot be parted into 2 equal groups"),
    (["--wav2vec2.width=9"], "--wav2vec2.*: model.position_groups is 8"),
    (["--models=splitformer,splitformer"], "--models holds 'splitformer': choose"),
    (["--models="], "--models is empty"),
    (["--model.num_exits=1"], "--model.num_exits=1 leaves nothing to choose"),
    (["--model.width=9"], "model.width is 9: it must be even"),
    (["--loss.weights=1,2,3"], "--loss.weights holds 3 numbers: give 2, one an exit"),
    (["--loss.weights=1,x"], "--loss.weights holds 'x': give float values"),
    (["--loss.distillation=-1"], "--loss.*: distillation is -1.0"),
    (["--test_split=test,test"], "--test_split=test,test names a split twice"),
    (["--model.branches=all"], "Unknown command line flag 'model.branches'"),
    (["--steps=0"], "steps=0"),
    (["--preset=huge"], "preset=huge"),
    (["--data_dir=/nowhere"], "/nowhere"),
    (["stray"], "unexpected argument 'stray'"),
]


@dataclasses.dataclass
class Runs:
    """A whole run, one that was broken and resumed, and what the other starts said."""

    root: Path
    whole: Path
    resumed: Path
    outcomes: dict[str, dict]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("exits")
    for seed, (split, count) in enumerate((("train", 8), ("dev", 6), ("test", 6))):
        write_librispeech(root / "data", split, ToneCorpus(count, seed, split))
    fixed = [f"--data_dir={root / 'data'}", f"--cache_dir={root / 'cache'}", *FLAGS]

    def start(work, *arguments, stop_at=None):
        return {"arguments": [*fixed, f"--workdir={root / work}", *arguments], "stop_at": stop_at}

    asked = {
        "whole": start("whole"),
        "broken": start("resumed", stop_at=3),
        "resumed": start("resumed", "--resume"),
        "again": start("whole"),
        "other": start("whole", "--resume", "--steps=5"),
    }
    asked |= {" ".join(flags): start("refused", *flags) for flags, _ in REFUSED}
    # Almost all of the time goes into compiling programs that then run for milliseconds.
    done = run_apart(PROGRAM, asked.values(), XLA_FLAGS="--xla_backend_optimization_level=0")
    outcomes = dict(zip(asked, done, strict=True))
    assert outcomes["whole"]["status"] == 0, outcomes["whole"]["stderr"]
    return Runs(root, root / "whole", root / "resumed", outcomes)


def read_report(workdir):
    return json.loads((workdir / "report.json").read_text(), parse_constant=pytest.fail)


def hypotheses(workdir, name, exit):
    path = workdir / "hypotheses" / f"{name}_exit{exit}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rates_of_every_exit_are_those_of_the_hypotheses(runs):
    report = read_report(runs.whole)
    assert [model["name"] for model in report["models"]] == list(NAMES)
    for model in report["models"]:
        assert [row["exit"] for row in model["exits"]] == [1, 2]
        for row in model["exits"]:
            lines = hypotheses(runs.whole, f"{model['name']}_test_test", row["exit"])
            texts = [x["reference"] for x in lines], [x["hypothesis"] for x in lines]
            assert len(lines) == 6
            assert row["wer"] == pytest.approx(jiwer.wer(*texts))
            assert row["cer"] == pytest.approx(jiwer.cer(*texts))
            assert row["ci"][0] <= row["wer"] <= row["ci"][1]
            lines = hypotheses(runs.whole, f"{model['name']}_dev", row["exit"])
            wer = jiwer.wer([x["reference"] for x in lines], [x["hypothesis"] for x in lines])
            assert row["dev_wer"] == pytest.approx(wer)


def test_points_of_the_curves_are_those_of_scores_and_thresholds(runs):
    report = read_report(runs.whole)
    samples = [u.num_samples for u in ToneCorpus(6, 2, "test").utterances]
    for model in report["models"]:
        config, _, _ = load_pretrained(runs.whole / model["name"])
        macs = np.array([exit_macs(config.config, s) for s in samples])
        lines = [hypotheses(runs.whole, f"{model['name']}_test_test", e) for e in (1, 2)]
        assert [line["id"] for line in lines[0]] == [line["id"] for line in lines[1]]
        scores = np.load(runs.whole / "exits" / f"{model['name']}_test_test.npz")
        for row, spent in zip(model["exits"], macs.T, strict=True):
            assert row["macs_per_second"] == pytest.approx(spent.sum() / (sum(samples) / 16000))
        for rule in ("entropy", "posterior", "max_probability", "similarity", "patience"):
            first = scores[f"rule_{rule}"][0]
            for row in model["curves"][rule]:
                threshold = float(row["threshold"])
                leaves = first <= threshold if rule == "entropy" else first >= threshold
                taken = [lines[0 if leave else 1][u] for u, leave in enumerate(leaves)]
                wer = jiwer.wer([x["reference"] for x in taken], [x["hypothesis"] for x in taken])
                assert row["wer"] == pytest.approx(wer)
                spent = np.where(leaves, macs[:, 0], macs[:, 1]).sum()
                assert row["cost"] == pytest.approx(spent / macs[:, 1].sum())


def test_models_are_on_equal_terms_and_compared(runs):
    report = read_report(runs.whole)
    baseline, splitformer, wav2vec2 = report["models"]
    assert (baseline["config"]["branches"], splitformer["config"]["branches"]) == (
        "none",
        "first_last",
    )
    same = {k: v for k, v in baseline["config"].items() if k != "branches"}
    assert same == {k: v for k, v in splitformer["config"].items() if k != "branches"}
    assert baseline["steps"] == splitformer["steps"] == wav2vec2["steps"] == 4
    assert wav2vec2["config"]["exits"] == [2, 4]
    assert wav2vec2["config"]["own_heads"] is True
    assert [row["layer"] for row in wav2vec2["exits"]] == [2, 4]
    # A branch has the parameters of a layer, and there are as many branches as blocks of one layer.
    width, vocabulary, mels = 8, 29, 20
    outside = 3 * (mels + width) * width + 2 * width + 2 * (width + 1) * vocabulary
    layers = baseline["parameters"] - outside
    assert splitformer["parameters"] - outside == 2 * layers
    rows = iter(report["differences"])
    for other in (splitformer, wav2vec2):
        for a, b, row in zip(baseline["exits"], other["exits"], rows, strict=False):
            assert (row["model"], row["exit"]) == (other["name"], a["exit"])
            assert row["difference"] == pytest.approx(b["wer"] - a["wer"])
    assert len(report["differences"]) == 4


@pytest.mark.parametrize("name", NAMES)
def test_saved_models_are_those_that_were_scored(runs, name):
    model, tokenizer, about = load_pretrained(runs.whole / name)
    assert about == {"data": "folder", "steps": 4, "model": name}
    if name != "wav2vec2":
        norm = model.blocks[0].layers[0].conv.middle_norm
        assert np.abs(norm.running_mean[...]).max() > 0  # moved by training
    corpus = FolderCorpus(runs.root / "data", "test", cache_dir=runs.root / "cache")
    audio = corpus.audio(0)
    output = model(audio[None], np.array([len(audio)]))
    scores = np.load(runs.whole / "exits" / f"{name}_test_test.npz")
    assert scores["frames"][0] == int(output.lengths[0])
    for exit, logits in enumerate(output.exit_logits, 1):
        z = np.asarray(logits[0], np.float64)
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        entropy = -(p * np.log(p)).sum(-1).mean()
        assert scores["rule_entropy"][exit - 1, 0] == pytest.approx(entropy, rel=1e-4)
        text = tokenizer.decode(ctc_collapse(z.argmax(-1)))
        assert hypotheses(runs.whole, f"{name}_test_test", exit)[0]["hypothesis"] == text


@pytest.mark.parametrize("name", NAMES)
def test_policy_and_predictor_are_saved_with_the_model(runs, name):
    model = next(m for m in read_report(runs.whole)["models"] if m["name"] == name)
    budget = model["exits"][model["best_fixed"] - 1]["dev_cost"]
    rows = [
        (row["dev_wer"], row["dev_cost"], rule, float(row["threshold"]))
        for rule, curve in model["curves"].items()
        for row in curve
        if row["budget"] == budget
    ]
    policy = load_policy(runs.whole / name)
    assert (policy.rule, policy.threshold) == min(rows)[2:]
    assert policy.n_best == 2
    assert load_predictor(runs.whole / name).weights.shape == (1, len(FEATURES))


def test_resumed_run_equals_the_unbroken_one(runs):
    assert runs.outcomes["broken"]["status"] == 130
    assert "add --resume" in runs.outcomes["broken"]["stderr"]
    assert runs.outcomes["resumed"]["status"] == 0, runs.outcomes["resumed"]["stderr"]
    for name in NAMES:
        whole, resumed = (
            load_file(w / name / "weights.safetensors") for w in (runs.whole, runs.resumed)
        )
        assert whole.keys() == resumed.keys()
        for key, value in whole.items():
            np.testing.assert_array_equal(resumed[key], value, err_msg=key)
    whole, resumed = read_report(runs.whole), read_report(runs.resumed)
    for key in whole.keys() - {"command", "stages", "date"}:
        assert resumed[key] == whole[key], key


def test_second_starts(runs):
    again, other = runs.outcomes["again"], runs.outcomes["other"]
    assert again["status"] == other["status"] == 2
    assert "holds a run already: add --resume" in again["stderr"]
    assert "steps was 4, is 5" in other["stderr"]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_wrong_flags_are_refused(runs, flags, message):
    outcome = runs.outcomes[" ".join(flags)]
    assert outcome["status"] == 2
    lines = [line for line in outcome["stderr"].splitlines() if not line.startswith("== ")]
    assert len(lines) == 1, outcome["stderr"]
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_report_and_plots(runs):
    text = (runs.whole / "report.md").read_text()
    plots = {path.name for path in (runs.whole / "plots").iterdir()}
    assert plots == {"wer_layer.png", "losses.png", *(f"wer_compute_{name}.png" for name in NAMES)}
    assert all(f"plots/{name}" in text for name in plots)
    for model in read_report(runs.whole)["models"]:
        assert f"{model['parameters']:,} parameters" in text
        for row in model["exits"]:
            assert f"{100 * row['wer']:.2f} % | " in text
    stages = [stage["name"] for stage in read_report(runs.whole)["stages"]]
    assert stages == ["data", *(f"{n} {s}" for n in NAMES for s in ("training", "evaluation"))]
