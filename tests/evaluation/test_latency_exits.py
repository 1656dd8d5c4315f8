"""Timing of exits: the contenders compute what they say, and the arithmetic of the rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.evaluation.latency import Timing
from edgespeech.evaluation.latency_exits import (
    branch_rows,
    exit_calls,
    exit_rows,
    segmentation_cost,
)
from edgespeech.inference.exit_criteria import mean_entropy
from tests.support.tiny_exits import exit_model


def test_contenders_compute_the_exits_of_the_model():
    model = exit_model(scale=0.5)
    audio = np.float32(0.1 * np.random.default_rng(0).normal(size=(1, 3520)))
    output = model(jnp.asarray(audio), jnp.asarray([3520]))
    calls = exit_calls(model, audio, "entropy")
    whole = calls["whole", 0]()
    x, _ = calls["front end", 0]()
    largest = np.abs(output.embedded).max()
    np.testing.assert_allclose(x, output.embedded, rtol=0, atol=1e-6 * largest)
    for exit in (1, 2, 3):
        np.testing.assert_allclose(calls["block", exit](), output.hidden[exit - 1], atol=1e-4)
        np.testing.assert_allclose(calls["head", exit](), output.exit_logits[exit - 1], atol=1e-4)
        tokens = np.asarray(whole[exit - 1][0])
        for name in ("segmented", "looking ahead", "single program"):
            result = calls[name, exit]()
            assert result.exits.tolist() == [exit]
            np.testing.assert_array_equal(result.tokens[0], tokens[tokens != 0])
    scores, tokens = calls["whole with scores", 0]()
    for exit in range(3):
        np.testing.assert_array_equal(tokens[exit], whole[exit])
        want = mean_entropy(output.exit_logits[exit], output.lengths)
        np.testing.assert_allclose(scores[exit], want, rtol=1e-4)
    # Branches at the first and the last exit.
    inputs = (output.embedded, *output.hidden)
    for exit in (1, 3):
        h, v = calls["layers", exit](), calls["branch", exit]()
        assert np.abs(v).max() > 0.1
        together = h + jnp.repeat(v, 2, axis=1)[:, : h.shape[1]]
        np.testing.assert_allclose(together, output.hidden[exit - 1], atol=1e-4)
        np.testing.assert_allclose(calls["batched", exit](), output.hidden[exit - 1], atol=1e-4)
        assert h.shape == inputs[exit - 1].shape
    assert model.blocks[0].execution == "sequential"
    assert len(calls) == 3 + 5 * 3 + 3 * 2


def test_rows_add_up():
    times = {
        ("whole", 0): 100.0,
        ("whole with scores", 0): 103.0,
        ("front end", 0): 10.0,
        ("block", 1): 20.0,
        ("head", 1): 5.0,
        ("block", 2): 30.0,
        ("head", 2): 5.0,
        ("segmented", 1): 38.5,
        ("segmented", 2): 103.0,
        ("looking ahead", 1): 40.0,
        ("looking ahead", 2): 102.0,
        ("layers", 1): 16.0,
        ("branch", 1): 5.0,
        ("batched", 1): 18.0,
        ("single program", 1): 36.0,
        ("single program", 2): 90.0,
    }
    timings = {name: Timing(value, 0.0) for name, value in times.items()}
    rows = exit_rows(timings)
    assert [row.exit for row in rows] == [1, 2]
    assert [row.parts_ms for row in rows] == [35.0, 70.0]
    assert rows[0].overhead == pytest.approx(1.1)
    assert rows[1].single_ms == 90.0
    assert rows[1].lookahead_ms == 102.0
    assert segmentation_cost(timings, rows) == pytest.approx(
        {
            "segmented_over_whole": 1.03,
            "segmented_over_scored": 1.0,
            "lookahead_over_whole": 1.02,
            "lookahead_over_scored": 102 / 103,
        }
    )
    (row,) = branch_rows(timings)
    assert row == (1, 16.0, 5.0, 20.0, 18.0, None)
    assert row.hidden == pytest.approx(0.2)
    (row,) = branch_rows(timings | {("sharded", 1): Timing(17.0, 0.0)})
    assert row.sharded_ms == 17.0
