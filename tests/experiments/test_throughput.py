"""The throughput program: what follows from its measurements, what it refuses, and a run of a small model."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.tiny import ROOT

# Runs the program on a narrow model, and then again with last batches of another shape, as those of a pipeline with a
# bucket too many would be.
SMALL = """
import sys
import jax
from absl import flags
from absl.testing import flagsaver
from experiments import program, throughput, throughput_subjects
from tests.support.tiny import tiny_config

def small():
    config = tiny_config(vocab_size=32, num_layers=2, conv_blocks=0)
    return throughput_subjects._ctc(config)

throughput.UTTERANCES = 8
throughput.SUBJECTS["small"] = small
with flagsaver.flagsaver():
    try:
        program.main(throughput.experiment)
    except SystemExit as stop:
        assert not stop.code
assert jax.config.jax_default_matmul_precision == "float32"
put, calls = throughput.shard_rows, []

def shard_rows(batch, mesh):
    calls.append(0)
    return put(batch._replace(audio=batch.audio[:, :8000]) if len(calls) > 2 else batch, mesh)

throughput.shard_rows = shard_rows
program.main(throughput.experiment)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """What the first run printed, its JSON, and how the second one ended."""
    path = tmp_path_factory.mktemp("throughput") / "t.json"
    done = subprocess.run(
        [
            *(sys.executable, "-c", SMALL, "--models=small", "--seconds=1", "--rows=2"),
            *("--steps=2", "--accumulate=2", "--matmul_size=64", "--data_seconds=0.2"),
            *("--remat", "--matmul_precision=float32", "--nodonate"),
            *(f"--json={path}", f"--cache_dir={os.environ['JAX_COMPILATION_CACHE_DIR']}"),
        ],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert path.exists(), done.stderr
    return done.stdout, json.loads(path.read_text()), done


def test_rates_follow_from_the_times(small):
    out, result, _ = small
    (row,) = result["results"]
    assert (row["model"], row["rows"], row["seconds"]) == ("small", 2, 1.0)
    step, matmul = row["step_s"], result["matmul_flops_per_s"]
    assert min(step, row["resident_step_s"], row["transfer_s"], row["compile_s"], matmul) > 0
    for name, value in (
        ("utterances_per_s", 2 / step),
        ("audio_s_per_s", 2 / step),
        ("flops_per_s", row["step_flops"] / step),
        ("share_of_matmul", row["step_flops"] / step / matmul),
        ("product_share_of_matmul", row["product_flops"] / step / matmul),
        ("data_over_compute", result["data"]["audio_s_per_s"] / (2 / step)),
    ):
        assert row[name] == pytest.approx(value), name
    assert 0 <= row["transfer_hidden"] <= 1
    assert row["compiled_after_warm_up"] == 0
    settings = result["settings"]
    assert (settings["accumulate"], settings["remat"], settings["donate"]) == (2, True, False)
    # Parameters, two moments, the average and the sum of gradients in float32; the old ones beside the new ones.
    assert row["memory_mb"] * 1e6 > 2 * 5 * 4 * row["parameters"]
    assert result["data"]["threads"] == 2
    line = next(line.split() for line in out.splitlines() if line.startswith("small "))
    assert line[:4] == ["small", f"{2 / step:.2f}", f"{2 / step:.1f}", f"{1000 * step:.1f}"]


def test_the_two_counts_of_flops_agree(small):
    """XLA's count has element-wise work, too, which is a good part of so narrow a model."""
    (row,) = small[1]["results"]
    assert 1 < row["step_flops"] / row["product_flops"] < 3


def test_a_compilation_after_the_warm_up_is_an_error(small):
    _, _, done = small
    assert done.returncode == 1
    assert "programs were compiled after the warm-up" in done.stderr


def test_bad_flags_are_refused(tmp_path):
    code = f"""
import sys
from absl import flags
from absl.testing import flagsaver
from experiments import program, throughput
throughput.write_tones = None
for argument in {json.dumps(["--models=huge", f"--json={tmp_path}/none/t.json", "--steps=0"])}:
    sys.argv = ["throughput", argument]
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        try:
            program.main(throughput.experiment)
        except SystemExit as stop:
            print("status", stop.code, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("status")] == ["status 2"] * 3, done.stderr
    assert "error: --models holds 'huge': choose from wav2vec2_tiny" in done.stderr
    assert f"there is no folder {tmp_path}/none" in done.stderr


def test_hidden_transfer():
    """A step of 1 s and a transfer of 0.2 s, in a process of its own: the program's flags are not other tests'."""
    code = (
        "from experiments.throughput import hidden\n"
        "print(*(hidden(streamed, 1.0, 0.2) for streamed in (1.0, 1.2, 1.05, 0.9, 3.0)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert [float(text) for text in done.stdout.split()] == pytest.approx(
        [1.0, 0.0, 0.75, 1.0, 0.0]
    )
