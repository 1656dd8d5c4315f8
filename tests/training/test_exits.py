"""The objective of exits: the sum of the papers, per token, and filler rows that have no part in anything."""

import jax
import numpy as np
import pytest
from flax import nnx

from edgespeech.data.batching import Batch
from edgespeech.errors import InputError
from edgespeech.nn.exits import exit_ctc_losses
from edgespeech.training.exits import ExitLossConfig, exit_objective
from tests.support.tiny_exits import exit_audio, exit_model

WEIGHTS = (0.5, 2.0)
# 5, 4 and 5 frames; the last row is filler: silence as long as the whole row.
AUDIO, LENGTHS = exit_audio((3520, 2880, 3520))
AUDIO[2] = 0.0
BATCH = Batch(
    audio=AUDIO,
    audio_lengths=LENGTHS,
    targets=np.array([[1, 2], [3, 0], [0, 0]], np.int32),
    target_lengths=np.array([2, 1, 0], np.int32),
    weights=np.array([1, 1, 0], np.float32),
    index=np.array([0, 1, -1], np.int32),
)


@pytest.fixture(scope="module")
def parts():
    model = exit_model(num_exits=2, num_heads=1, conv_kernel=3)
    return nnx.split(model, nnx.Param, nnx.BatchStat)


def objective(parts, batch, config):
    graphdef, params, statistics = parts
    loss = exit_objective(graphdef, config)

    @jax.jit
    def run(params, batch):
        value, _, new = loss(params, batch, jax.random.key(0), 0, statistics)
        return value, new

    return run(params, batch)


def test_loss_is_the_weighted_sum_per_token_without_filler(parts):
    value, statistics = objective(parts, BATCH, ExitLossConfig(weights=WEIGHTS))
    real = Batch(*(part[:2] for part in BATCH))
    graphdef, params, before = parts

    @jax.jit
    def plain(params):
        model = nnx.merge(graphdef, params, before, copy=True)
        output = model(real.audio, real.audio_lengths, jax.random.key(0))
        losses = exit_ctc_losses(
            output.exit_logits, output.lengths, real.targets, real.target_lengths
        )
        return losses, nnx.state(model, nnx.BatchStat)

    losses, wanted = plain(params)
    expected = (np.array(WEIGHTS) @ np.asarray(losses) / [2, 1]).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    pairs = zip(*map(jax.tree.leaves, (statistics, wanted, before)), strict=True)
    for found, expected, start in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert not np.allclose(found, start)


def test_gradients_are_finite_and_statistics_have_none(parts):
    graphdef, params, statistics = parts
    loss = exit_objective(graphdef, ExitLossConfig(distillation=0.5))

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: loss(p, BATCH, jax.random.key(0), 0, statistics)[0])(params)

    leaves = jax.tree.leaves(gradient(params))
    assert len(leaves) == len(jax.tree.leaves(params))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert sum(np.abs(leaf).max() > 0 for leaf in leaves) > 0.9 * len(leaves)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (1.0, -1.0)}, "weights are"),
        ({"weights": (0.0, 0.0)}, "not all 0"),
        ({"distillation": -1.0}, "distillation is -1.0"),
        ({"distillation": float("nan")}, "distillation is nan"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_values_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        ExitLossConfig(**changes)
