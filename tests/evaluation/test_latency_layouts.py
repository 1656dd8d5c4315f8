"""Both layouts of attention through XLA and LiteRT: the same numbers, and the ratios that follow from the times."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from edgespeech.evaluation.latency import Timing
from edgespeech.evaluation.latency_layouts import (
    CHANNELS_FIRST,
    STANDARD,
    Contender,
    Layouts,
    Measured,
    in_standard_layout,
    layout_calls,
    layout_rows,
)
from tests.support.modules import randomize
from tests.support.tiny import ROOT


def plain_attention(attention, x):
    """The layer in float64, head by head."""

    def linear(layer, x):
        return x @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])

    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    parts = [np.split(linear(layer, x), attention.num_heads, axis=-1) for layer in projections]
    heads = []
    for q, k, v in zip(*parts, strict=True):
        weights = np.exp(q @ k.T * q.shape[-1] ** -0.5)
        heads.append(weights / weights.sum(-1, keepdims=True) @ v)
    return linear(attention.out_proj, np.concatenate(heads, axis=-1))


def test_both_layouts_give_the_same_numbers_in_both_runtimes():
    pytest.importorskip("ai_edge_litert")
    pytest.importorskip("litert_converter")
    layouts = Layouts(width=12, num_heads=3, frames=(11,), chunks=(0, 4, 11))
    attention = randomize(layouts.attention())
    calls = layout_calls(layouts, attention, threads=1)
    assert list(calls) == [
        Contender(11, layout, chunk, runtime)
        for layout, chunk in ((STANDARD, 0), (CHANNELS_FIRST, 0), (CHANNELS_FIRST, 4))
        for runtime in ("XLA", "LiteRT")
    ]
    want = plain_attention(attention, np.float64(layouts.input(11)[0]))
    for contender, call in calls.items():
        y = in_standard_layout(contender, call())
        np.testing.assert_allclose(y[0], want, atol=2e-5, err_msg=str(contender))


def test_ratios_are_of_one_length_and_one_runtime():
    times = {
        Contender(9, STANDARD, 0, "XLA"): 2.0,
        Contender(9, STANDARD, 0, "LiteRT"): 3.0,
        Contender(9, CHANNELS_FIRST, 4, "XLA"): 5.0,
        Contender(9, CHANNELS_FIRST, 4, "LiteRT"): 12.0,
        Contender(20, STANDARD, 0, "XLA"): 7.0,
    }
    measured = Measured({c: Timing(t, 0.1) for c, t in times.items()}, dict.fromkeys(times, 0.0))
    rows = layout_rows(2, measured)
    assert [row["over_standard"] for row in rows] == [1.0, 1.0, 2.5, 4.0, 1.0]
    assert [row["over_xla"] for row in rows] == [1.0, 1.5, 1.0, 2.4, 1.0]
    assert rows[3]["frames"] == 9
    assert rows[3]["chunk"] == 4
    assert rows[3]["threads"] == 2


def run_program(*arguments):
    return subprocess.run(
        [
            *(sys.executable, "-m", "experiments.layouts", "--width=8", "--heads=2", *arguments),
            f"--cache_dir={os.environ['JAX_COMPILATION_CACHE_DIR']}",
        ],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip


def test_the_program(tmp_path):
    pytest.importorskip("ai_edge_litert")
    pytest.importorskip("litert_converter")
    path = tmp_path / "layouts.json"
    done = run_program("--frames=6", "--chunks=0", "--threads=1", "--repeats=2", f"--json={path}")
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["results"]
    assert [(row["layout"], row["runtime"]) for row in rows] == [
        (layout, runtime) for layout in (STANDARD, CHANNELS_FIRST) for runtime in ("XLA", "LiteRT")
    ]
    standard, _, ours, _ = rows
    assert ours["over_standard"] == pytest.approx(ours["median_ms"] / standard["median_ms"])
    assert max(row["difference"] for row in rows) < 1e-6
    assert "(B, C, 1, S), all queries" in done.stdout


def test_the_program_refuses_bad_numbers():
    done = run_program("--frames=0")
    assert done.returncode == 2
    assert "error: --frames holds 0: give values from 1 to 100000" in done.stderr
