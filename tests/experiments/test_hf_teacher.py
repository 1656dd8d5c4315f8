"""The conversion program with a Hugging Face teacher and two test splits, from the beginning to the end."""

import json

import jiwer
import pytest

from edgespeech.interop.pretrained import load_pretrained
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA
from tests.golden.hf_checkpoint import IDS
from tests.support.programs import TINY_RUN, run_inside, write_tones
from tests.support.tiny import ToneCorpus, write_librispeech

SPLITS = ["test", "test-other"]
# No sizes: they are the checkpoint's.
RUN = [argument for argument in TINY_RUN if not argument.startswith("--model.")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Speech, and a checkpoint of two layers of width 32 with random weights: arguments of the program."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.make_hf_wav2vec2 import random_model

    root = tmp_path_factory.mktemp("inputs")
    write_tones(root / "data")
    write_librispeech(root / "data", "test-other", ToneCorpus(3, 5, "test-other"))
    random_model(channels=16).save_pretrained(root / "hf")
    (root / "hf" / "vocab.json").write_text(json.dumps(IDS))
    return [
        *RUN,
        "--preset=wav2vec2_base",
        f"--teacher={root / 'hf'}",
        f"--data_dir={root / 'data'}",
        f"--cache_dir={root / 'cache'}",
        f"--test_split={','.join(SPLITS)}",
        *("--replaced=1", "--controls=none", "--sweep_steps=2", "--distil.steps_per_layer=2"),
    ]


def test_the_whole_experiment(inputs, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    status, out, error = run_inside([*inputs, f"--workdir={work}"], monkeypatch, capsys)
    assert status == 0, error
    report = json.loads((work / "report.json").read_text())

    teacher, (hybrid,) = report["teacher"], report["hybrids"]
    assert (teacher["config"]["width"], teacher["config"]["vocab_size"]) == (32, 32)
    assert teacher["config"]["front_end"] == "waveform"
    assert teacher["steps"] == 0
    assert not (work / "teacher").exists()  # nothing was trained
    assert [row["layer"] for row in report["sweep"]] == [1, 2]
    assert hybrid["replaced"] == 1
    assert hybrid["layers"] == report["order"][:1]

    data = report["data"]
    assert data["test"]["name"] == "test"
    assert (data["test"]["utterances"], list(data["splits"])) == (4, ["test-other"])
    assert data["splits"]["test-other"]["utterances"] == 3
    for name, row in (("teacher", teacher), ("lpa_1", hybrid)):
        rates = {name: row, f"{name}_test-other": row["splits"]["test-other"]}
        for file, found in rates.items():
            text = (work / "hypotheses" / f"{file}.jsonl").read_text()
            lines = [json.loads(line) for line in text.splitlines()]
            wer = jiwer.wer([x["reference"] for x in lines], [x["hypothesis"] for x in lines])
            assert found["wer"] == pytest.approx(wer), file
    further = hybrid["splits"]["test-other"]
    difference = further["wer"] - teacher["splits"]["test-other"]["wer"]
    assert further["delta_vs_teacher"]["difference"] == pytest.approx(difference)

    shown = f"teacher: WER {teacher['wer']:.2%} (test), "
    assert shown + f"{teacher['splits']['test-other']['wer']:.2%} (test-other)" in out
    assert "test test-other: folder, 3 utterances" in out
    assert "WER, test-other" in (work / "report.md").read_text()

    model, tokenizer, about = load_pretrained(work / "hybrid_1")
    kinds = [type(layer.mixer) for layer in model.layers]
    assert sorted(k.__name__ for k in kinds) == sorted(k.__name__ for k in (LPA, SelfAttention))
    assert kinds[report["order"][0] - 1] is LPA
    assert tokenizer.vocabulary == tuple(IDS)
    assert about["test_wer"] == hybrid["wer"]
