"""The main program with a CTC head on a Moonshine's encoder: from the saved Moonshine to a hybrid."""

import json

import numpy as np
import pytest

from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.models.moonshine_ctc import MoonshineCTC
from edgespeech.nn.lpa import LPA
from edgespeech.training.metrics import read_metrics
from tests.support.moonshine import tiny_moonshine
from tests.support.moonshine_conversion import letters
from tests.support.programs import TINY_RUN, run_inside, write_tones

SIZES = ("num_layers=2", "width=16", "num_heads=2", "ffn_width=24")
RUN = [
    *(x for x in TINY_RUN if not x.startswith(("--model.", "--intermediate_ctc"))),
    *(f"--model.{size}" for size in (*SIZES, "rotary_factor=0.8", "head_width=12")),
    *("--preset=moonshine_tiny", "--lpa.octaves=1", "--replaced=1", "--controls=none"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Arguments of the program that start from the encoder of a saved Moonshine."""
    root = tmp_path_factory.mktemp("inputs")
    write_tones(root / "data")
    save_pretrained(root / "moonshine", tiny_moonshine(), letters(), {})
    data = [f"--data_dir={root / 'data'}", f"--cache_dir={root / 'cache'}"]
    return [*RUN, *data, f"--init={root / 'moonshine'}"]


def test_the_whole_experiment(inputs, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    arguments = [*inputs, f"--workdir={work}", "--head_steps=5"]
    status, _, error = run_inside(arguments, monkeypatch, capsys)
    assert status == 0, error
    report = json.loads((work / "report.json").read_text())
    assert report["teacher"]["config"]["width"] == 16
    assert report["teacher"]["config"]["head_width"] == 12
    assert [row["replaced"] for row in report["hybrids"]] == [1]
    hybrid, tokenizer, _ = load_pretrained(work / "hybrid_1")
    assert isinstance(hybrid, MoonshineCTC)
    assert hybrid.config.vocab_size == tokenizer.vocab_size
    replaced = hybrid.layers[report["order"][0] - 1].mixer
    assert isinstance(replaced, LPA)
    assert replaced.config.octaves == 1
    # The head learned first, from an encoder that is not random: the teacher goes on from where it stopped.
    head, teacher = (read_metrics(work / f"metrics/{x}.jsonl") for x in ("head", "teacher"))
    assert [row["step"] for row in head][-1] == 4
    assert teacher[0]["ctc"] < head[0]["ctc"]


def test_without_the_heads_own_steps_all_learn_at_once(inputs, tmp_path, monkeypatch, capsys):
    """One step at a rate that moves nothing: the encoder is the Moonshine's."""
    work = tmp_path / "work"
    still = ("--head_steps=0", "--teacher_steps=1", "--optimizer.learning_rate=1e-12")
    arguments = [*inputs, f"--workdir={work}", *still, "--sweep_steps=1"]
    status, _, error = run_inside([*arguments, "--distil.steps_per_layer=1"], monkeypatch, capsys)
    assert status == 0, error
    assert not (work / "checkpoints" / "head").exists()
    teacher, _, _ = load_pretrained(work / "teacher")
    for ours, theirs in zip(teacher.layers, tiny_moonshine().layers, strict=True):
        np.testing.assert_allclose(ours.ffn.expand.kernel, theirs.ffn.expand.kernel, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--preset=tiny"], ["--model.rotary_factor is not for --preset=tiny"]),
        (["--model.num_mels=20"], ["--model.num_mels is not for --preset=moonshine_tiny"]),
        (
            ["--model.width=32"],
            ["has an encoder of other sizes", "layers.0.ffn.contract.bias has shape [16]"],
        ),
    ],
)
def test_what_does_not_fit_is_refused(inputs, arguments, parts, tmp_path, monkeypatch, capsys):
    run = [*inputs, *arguments, f"--workdir={tmp_path / 'work'}"]
    status, _, error = run_inside(run, monkeypatch, capsys)
    assert status != 0
    for part in parts:
        assert part in error


def test_a_start_of_another_family_is_refused(inputs, tmp_path, monkeypatch, capsys):
    sizes = [x for x in inputs if not x.startswith("--model.")]
    run = [*sizes, "--preset=tiny", f"--workdir={tmp_path / 'work'}"]
    status, _, error = run_inside(run, monkeypatch, capsys)
    assert status != 0
    assert "is a MoonshineCTC and --preset=tiny a Wav2Vec2: choose another preset" in error
