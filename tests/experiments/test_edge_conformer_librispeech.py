"""The program on the edge Conformer at toy size: its report computed again, and wrong flags."""

import json

import jiwer
import pytest

from tests.support.apart import run_apart
from tests.support.tiny import ToneCorpus, write_librispeech

PROGRAM = "experiments.edge_conformer_librispeech"
SIZES = {
    "width": 8,
    "num_layers": 1,
    "num_heads": 2,
    "ffn_width": 8,
    "conv_kernel": 3,
    "num_mels": 20,
    "chunk": 2,
    "left": 1,
}
FLAGS = [
    *(f"--model.{name}={value}" for name, value in SIZES.items()),
    *("--steps=2", "--data=folder", "--tokenizer=char", "--chunks=1,3", "--lefts=0,2"),
    *("--batch.batch_seconds=2.3", "--batch.num_buckets=1", "--batch.speed_factors=1"),
]
REFUSED = [
    (["--chunks="], "--chunks and --lefts need a number each"),
    (["--chunks=0"], "--chunks holds 0: give values from 1 to 1000"),
    (["--test_split=test,dev"], "names 2 splits: give one"),
    (["--model.width=9"], "model.num_heads is 2: it must be such that model.width 9"),
    (["--model.mixer=lpa"], "Unknown command line flag 'model.mixer'"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("edge")
    for seed, (split, count) in enumerate((("train", 8), ("dev", 2), ("test", 6))):
        write_librispeech(root / "data", split, ToneCorpus(count, seed, split))
    fixed = [f"--data_dir={root / 'data'}", f"--cache_dir={root / 'cache'}", *FLAGS]
    starts = [("whole", []), *(("refused", flags) for flags, _ in REFUSED)]
    asked = [
        {"arguments": [*fixed, f"--workdir={root / work}", *flags], "stop_at": None}
        for work, flags in starts
    ]
    # Almost all of the time goes into compiling programs that then run for milliseconds.
    outcomes = run_apart(PROGRAM, asked, XLA_FLAGS="--xla_backend_optimization_level=0")
    assert outcomes[0]["status"] == 0, outcomes[0]["stderr"]
    return root / "whole", outcomes[1:]


def test_report(runs):
    workdir, _ = runs
    report = json.loads((workdir / "report.json").read_text(), parse_constant=pytest.fail)

    def hypotheses(name):
        path = workdir / "hypotheses" / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def wer(name):
        rows = hypotheses(name)
        return jiwer.wer([r["reference"] for r in rows], [r["hypothesis"] for r in rows])

    assert [model["name"] for model in report["models"]] == ["attention", "vanilla", "lpa"]
    for model in report["models"]:
        assert model["wer"] == pytest.approx(wer(model["name"]))
        assert model["difference"] == pytest.approx(model["wer"] - wer("attention"))
        assert model["real_time_factor"] > 0
    attention, vanilla, lpa = report["models"]
    # 9 d d weights of the second convolution against 9 d and d d.
    assert vanilla["parameters"] - attention["parameters"] == 9 * 64 - (9 * 8 + 64)
    assert vanilla["macs_per_second"] > attention["macs_per_second"]
    assert lpa["config"]["mixer"] == "lpa"
    assert [(row["size"], row["left"]) for row in report["matrix"]] == [
        *((size, left) for size in (1, 3) for left in (0, 2)),
        (None, None),
    ]
    for row in report["matrix"][:-1]:
        name = f"attention_chunk{row['size']}_left{row['left']}"
        assert row["wer"] == pytest.approx(wer(name))
    assert report["streaming"]["different"] == 0
    assert report["streaming"]["utterances"] == 6
    assert report["streaming"]["wer"] == [pytest.approx(wer("attention"))] * 2
    assert report["float16"]["wer"][1] == pytest.approx(wer("attention_float16"))
    text = (workdir / "report.md").read_text()
    for title in ("every latency", "whole against streamed", "| vanilla |", "wer_chunk.png"):
        assert title in text


def test_wrong_flags_are_refused(runs):
    _, outcomes = runs
    for (arguments, message), outcome in zip(REFUSED, outcomes, strict=True):
        assert outcome["status"] == 2, arguments
        assert message in outcome["stderr"], arguments
