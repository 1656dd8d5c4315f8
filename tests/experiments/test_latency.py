"""The latency program from outside: its JSON, its tables, and the flags that it refuses.

It runs in processes of its own: its flags are not those of the other programs.
"""

import json
import os
import subprocess
import sys

import pytest

from edgespeech.inference.exit_budget import exit_compute
from tests.support.tiny import ROOT
from tests.support.tiny_exits import exit_model

# Runs the program for several lists of arguments up to the first model with replaced layers.
DRIVER = """
import json, sys
from absl import flags
from absl.testing import flagsaver
from edgespeech.errors import InputError
from edgespeech.evaluation.latency_models import TimedWav2Vec2
from experiments import latency, program

def build(self, layers):
    if layers:
        raise InputError(f"computing begins with {layers}")

TimedWav2Vec2.build = build
latency.prepare_forward = latency.prepare_parts = lambda *_: None
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["latency", *arguments]
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        try:
            program.main(latency.experiment)
        except SystemExit as stop:
            print("status", stop.code, file=sys.stderr)
"""
# Runs the program on a waveform model that takes no time; its memory is measured elsewhere.
SMALL_WAVEFORM = """
from edgespeech.evaluation.latency_models import TimedWav2Vec2
from edgespeech.models.wav2vec2 import Wav2Vec2Config
from experiments import latency, program

sizes = dict(width=16, num_layers=1, num_heads=2, ffn_width=16, front_channels=8)
config = Wav2Vec2Config(**sizes, position_kernel=8, position_groups=2)
latency.MODELS["tiny"] = TimedWav2Vec2(config)
latency.peak_memory_mb = lambda load, audio: 1.0 * len(audio)
program.main(latency.experiment)
"""
# Runs the program on a model with exits that takes no time.
SMALL_EXITS = """
from experiments import latency, latency_exits, program
from tests.support.tiny_exits import exit_model

latency_exits.EXIT_MODELS["splitformer_tiny"] = exit_model
program.main(latency.experiment)
"""
REFUSED = [
    (["--replaced=0,13"], "--replaced holds 13: give values from 0 to 12"),
    (["--replaced=0,x"], "--replaced holds 'x': give int values"),
    (["--replaced=2"], "--replaced=2 lacks 0"),
    # 15 feature frames make one of the encoder: 400 + 14 * 160 samples.
    (["--seconds=1,0.01"], "--seconds holds 0.01: one frame of tiny takes 0.165 s or more"),
    (["--seconds=-1"], "--seconds holds -1: one frame of tiny takes"),
    (["--seconds=soon"], "--seconds holds 'soon': give numbers"),
    (["--seconds=nan"], "--seconds holds 'nan': give numbers"),
    (["--seconds="], "--seconds is empty"),
    (["--order=1,2,3"], "--order names 3 layers and --replaced asks for 4"),
    (["--order=1,2,2,3,4"], "--order=1,2,2,3,4 names a layer twice"),
    (["--order=0,1,2,3"], "--order holds 0: give values from 1 to 12"),
    (["--repeats=0"], "--repeats=0: a median needs at least 1"),
    (["--threads=0"], "0 threads: give 1 to"),
    (["--json={file}/inside/l.json"], "--json={file}/inside/l.json cannot be written"),
    (["--json={folder}"], "--json={folder} cannot be written (it is a folder): name another file"),
    (["--model=huge"], "huge"),
    (["stray"], "unexpected argument 'stray'"),
    ([], "computing begins with (0, 1, 2, 3)"),
    (["--order=4,2,3,12,1", "--json={folder}/new/l.json"], "computing begins with (3, 1, 2, 11)"),
]


def test_bad_flags_are_refused_before_computing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    places = {"file": tmp_path / "file", "folder": tmp_path}
    runs = [
        [
            *("--model=tiny", "--replaced=0,4", "--seconds=1", f"--cache_dir={tmp_path}"),
            *(argument.format(**places) for argument in arguments),
        ]
        for arguments, _ in REFUSED
    ]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(runs)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    messages = done.stderr.split("status 2\n")
    assert len(messages) == len(REFUSED) + 1, done.stderr
    for (arguments, want), message in zip(REFUSED, messages, strict=False):
        assert message.startswith("error: "), (arguments, message)
        assert message.count("\n") == 1, (arguments, message)
        assert want.format(**places) in message, (arguments, message)
    assert not list(tmp_path.rglob("*.json"))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """What a whole run printed, and its JSON."""
    path = tmp_path_factory.mktemp("latency") / "l.json"
    command = [
        *(sys.executable, "-m", "experiments.latency", "--model=tiny", "--replaced=0,2"),
        *("--order=3,1", "--seconds=1", "--repeats=2", "--threads=1", "--peers", f"--json={path}"),
        f"--cache_dir={os.environ['JAX_COMPILATION_CACHE_DIR']}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def test_json(tiny_run):
    _, result = tiny_run
    assert list(result) == [
        *("results", "ratios", "versions", "device", "threads", "date", "command")
    ]
    assert [(row["implementation"], row["replaced"]) for row in result["results"]] == [
        ("edgespeech", 0),
        ("edgespeech", 2),
    ]
    for row in result["results"]:
        assert list(row) == [
            *("model", "replaced", "seconds", "implementation", "median_ms", "spread_ms"),
            *("peak_mb", "parts_ms", "compile_s"),
        ]
        assert (row["model"], row["seconds"]) == ("tiny", 1.0)
        assert list(row["parts_ms"]) == [
            *("front_end", "projection_positions", "ffn", "mixers", "head")
        ]
        numbers = [row["median_ms"], row["compile_s"], *row["parts_ms"].values()]
        assert min(numbers) > 0
        assert row["spread_ms"] >= 0
        assert row["peak_mb"] >= 0
    assert result["threads"] == 1
    assert result["device"]["cores"] == 1
    assert {"jax", "torch", "transformers", "onnx", "onnxruntime"} <= result["versions"].keys()
    assert result["command"].startswith("python -m experiments.latency --model=tiny --replaced=0,2")


def test_ratios_follow_from_the_rows(tiny_run):
    _, result = tiny_run
    whole, hybrid = result["results"]
    gone = whole["parts_ms"]["mixers"] - hybrid["parts_ms"]["mixers"]
    like_for_like = whole["median_ms"] / hybrid["median_ms"]
    parts = sum(whole["parts_ms"].values())
    bound = parts / (parts - gone)
    assert result["ratios"] == {
        "like_for_like": {"1": {"2": pytest.approx(like_for_like)}},
        "amdahl_bound": {"1": {"2": pytest.approx(bound)}},
        # The quick presets have a front end that the peers lack.
        "vs_transformers_eager": {},
        "vs_transformers_sdpa": {},
        "vs_onnxruntime": {},
    }
    # Everything but the mixers is alike, and timed once for both.
    for part in ("front_end", "projection_positions", "ffn", "head"):
        assert whole["parts_ms"][part] == hybrid["parts_ms"][part]


def test_tables(tiny_run):
    out, result = tiny_run
    whole, hybrid = result["results"]
    lines = [line.split() for line in out.splitlines()]

    def expect(*cells):
        assert [str(cell) for cell in cells] in lines, out

    for row in (whole, hybrid):
        ms, parts = row["median_ms"], row["parts_ms"]
        expect(
            *("edgespeech", row["replaced"], "1", f"{ms:.1f}", f"{row['spread_ms']:.1f}"),
            *(f"{ms / 1000:.4f}", f"{row['peak_mb']:.0f}"),
        )
        expect("edgespeech", row["replaced"], f"{ms:.2f}")
        shares = f"{sum(parts.values()) / ms:.1%}"
        expect(row["replaced"], "1", *(f"{value:.1f}" for value in parts.values()), shares)
    ratio = result["ratios"]["like_for_like"]["1"]["2"]
    bound = result["ratios"]["amdahl_bound"]["1"]["2"]
    expect("2", "1", f"{ratio:.2f}", f"{bound:.2f}", f"{ratio / bound:.1%}")
    assert "Against other implementations, whose framework and kernels differ" in out
    for peer in ("transformers_eager", "transformers_sdpa", "onnxruntime"):
        assert f"note: {peer} is absent: it has wav2vec2 with the waveform front end alone" in out


def test_peers_in_results_ratios_and_table(tmp_path):
    for package in ("torch", "transformers", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    path = tmp_path / "l.json"
    done = subprocess.run(
        [
            *(sys.executable, "-c", SMALL_WAVEFORM, "--model=tiny", "--replaced=0", "--noparts"),
            *("--seconds=0.25", "--repeats=2", "--peers", "--quiet", f"--json={path}"),
            f"--cache_dir={os.environ['JAX_COMPILATION_CACHE_DIR']}",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    ours, *theirs = result["results"]
    peers = ["transformers_eager", "transformers_sdpa", "onnxruntime"]
    assert ours["implementation"] == "edgespeech"
    assert [row["implementation"] for row in theirs] == peers
    assert all(row["parts_ms"] == {} and row["peak_mb"] == 1.0 for row in result["results"])
    assert [row["compile_s"] for row in theirs] == [None] * 3
    ratios = {row["implementation"]: row["median_ms"] / ours["median_ms"] for row in theirs}
    assert result["ratios"] == {
        "like_for_like": {},
        "amdahl_bound": {},
        **{f"vs_{name}": {"0.25": {"0": pytest.approx(ratio)}} for name, ratio in ratios.items()},
    }
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["replaced", "seconds", *peers] in lines
    assert ["0", "0.25", *(f"{ratio:.2f}" for ratio in ratios.values())] in lines
    assert "note:" not in done.stdout
    assert "Parts of" not in done.stdout


def test_exits_and_branches_on_two_devices(tmp_path):
    file = tmp_path / "exits.json"
    flags = ["--model=splitformer_tiny", "--seconds=0.3", "--repeats=1", f"--json={file}"]
    options = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", SMALL_EXITS, *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": options},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert [row["exit"] for row in result["exits"]] == [1, 2, 3]
    macs = exit_compute(exit_model(), 0.3)
    want = [(macs[1] - macs[0]) / macs[2], (macs[2] - macs[1]) / macs[2], 0.0]
    assert [row["lookahead_waste"] for row in result["exits"]] == pytest.approx(want)
    assert [row["exit"] for row in result["branches"]] == [1, 3]
    for row in result["branches"]:
        assert row["sharded_ms"] > 0
        alone = row["layers_ms"] + row["branch_ms"]
        assert row["hidden"] == pytest.approx((alone - row["sequential_ms"]) / row["branch_ms"])
        line = [f"{row[name]:.2f}" for name in ("layers_ms", "branch_ms", "sequential_ms")]
        assert all(cell in done.stdout for cell in line)
    last = result["exits"][-1]
    for name, ms in (("segmented", last["median_ms"]), ("lookahead", last["lookahead_ms"])):
        ratio = result["full_depth"]["0.3"][f"{name}_over_whole"]
        assert ratio == pytest.approx(ms / last["whole_ms"])
        assert f"{ratio:.3f}" in done.stdout
