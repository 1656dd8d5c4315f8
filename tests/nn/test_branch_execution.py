"""Blocks with a branch: as one batch and on two devices they compute what they compute one after another."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.summary_mixing import SummaryMixing
from tests.support.branches import (
    LENGTHS,
    OPTIONS,
    assert_equal_outcomes,
    frames,
    make_block,
    outcome,
)
from tests.support.tiny import ROOT
from tests.support.tiny_exits import exit_model


@pytest.mark.parametrize("changes", [{}, OPTIONS], ids=["splitformer", "options"])
def test_batched_is_sequential(changes):
    want = outcome(make_block(**changes), "sequential")
    assert_equal_outcomes(outcome(make_block(**changes), "batched"), want)
    gradients = [value for name, value in want.items() if name.startswith("d ")]
    assert sum(np.any(value != 0) for value in gradients) > 0.8 * len(gradients)


def test_batched_training_moves_the_running_statistics_alike():
    block = make_block()
    key = jax.random.key(0)
    want = outcome(block, "sequential", key)
    assert_equal_outcomes(outcome(make_block(), "batched", key), want)
    (moved,) = [
        value
        for name, value in want.items()
        if name == "branch.layer.conv.middle_norm.running_mean"
    ]
    before = block.branch.layer.conv.middle_norm.running_mean[...]
    assert np.abs(moved - before).max() > 1e-3


SHARDED = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
from tests.support.branches import OPTIONS, assert_equal_outcomes, make_block, outcome
for changes in ({}, OPTIONS):
    want = outcome(make_block(**changes), "sequential")
    assert_equal_outcomes(outcome(make_block(**changes), "sharded"), want)
"""


def test_two_devices_give_what_one_gives():
    subprocess.run([sys.executable, "-c", SHARDED], check=True, cwd=ROOT)


def test_what_cannot_be_run_so():
    model = exit_model()
    with pytest.raises(InputError, match="'parallel': choose sequential, batched, sharded"):
        model.execute_branches("parallel")
    model.execute_branches("sharded")
    assert [block.execution for block in model.blocks] == ["sharded"] * 3
    block, lengths = model.blocks[0], np.asarray(LENGTHS)
    with pytest.raises(InputError, match="'sharded' is for inference"):
        block(frames(), lengths, jax.random.key(0))
    with pytest.raises(InputError, match="needs 2 devices and there is 1"):
        block(frames(), lengths)
    block.execution = "batched"
    layer = block.layers[0]
    layer.mixer = SummaryMixing.from_attention(layer.mixer, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="not built alike: give both the same mixer"):
        block(frames(), lengths)
