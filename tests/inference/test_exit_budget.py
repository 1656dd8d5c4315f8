"""Budgets at run time, and scoring with a policy, against fixed exits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.data.tokenizer import ctc_collapse
from edgespeech.errors import InputError
from edgespeech.evaluation.exit_decoder import EarlyExitDecoder
from edgespeech.inference import exit_budget
from edgespeech.inference.exit_budget import (
    exit_compute,
    exit_within_compute,
    exit_within_deadline,
)
from edgespeech.inference.exit_policy import ExitPolicy
from edgespeech.models.exit_macs import exit_macs
from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits
from edgespeech.ops.ctc import greedy_path
from tests.support.tiny import tiny_model, tone_source
from tests.support.tiny_exits import exit_model


def test_compute_is_that_of_the_formula():
    model = exit_model()
    # The formula leaves the mel filters out, and counts a few taps that meet padding.
    filters = (1 + 160_000 // 160) * 513 * model.config.num_mels
    wanted = filters + np.array(exit_macs(model.config, 160_000))
    np.testing.assert_allclose(exit_compute(model, 10.0), wanted, rtol=5e-3)


def test_compute_of_a_wav2vec2_by_hand():
    model = tiny_model(num_layers=3)
    found = exit_compute(Wav2Vec2Exits(model, (1, 3)), 2.0)
    c = model.config
    n = c.num_frames(32_000)
    layer = n * (4 * c.width**2 + 2 * n * c.width + 2 * c.width * c.ffn_width)
    head = n * c.width * c.vocab_size
    assert found[1] - found[0] == 2 * layer + head


def test_the_deepest_exit_within_a_share_of_the_compute():
    model = exit_model()
    costs = np.array(exit_compute(model, 10.0)) / exit_compute(model, 10.0)[-1]
    for exit, cost in enumerate(costs, 1):
        assert exit_within_compute(model, cost) == exit
        assert exit_within_compute(model, np.nextafter(cost, 2)) == exit
    with pytest.raises(InputError, match="the first exit alone costs"):
        exit_within_compute(model, 0.9 * costs[0])


def test_the_deepest_exit_within_a_deadline(monkeypatch):
    # A clock on which the calls of exits 1, 2, 3 take 40, 30 and 90 ms, the first of each, which compiles, a second.
    calls = [d for ms in (40, 30, 90) for d in (1.0, *(ms / 1e3 for _ in range(3)))]
    ticks = iter(list(itertools.accumulate(x for d in calls for x in (10.0, d))))
    monkeypatch.setattr(exit_budget.time, "perf_counter", lambda: next(ticks))
    exit, times = exit_within_deadline(exit_model(), 45.0, seconds=1.0, repeats=3)
    assert exit == 2
    assert times == pytest.approx([40.0, 30.0, 90.0])
    for deadline in (0.0, -1.0):
        with pytest.raises(InputError, match="must be above 0"):
            exit_within_deadline(exit_model(), deadline)


class Letters:
    def decode(self, ids):
        return " ".join("_ABCD"[i] for i in ids)


@pytest.mark.parametrize("exit", [1, 2, 3])
def test_scores_are_those_of_the_exit(exit):
    model, source = exit_model(scale=0.5), tone_source()
    graphdef, state = nnx.split(model)
    decoder = EarlyExitDecoder(graphdef, Letters(), ExitPolicy("entropy", -np.inf), exit)
    result = decoder.score(state, source)
    assert decoder.taken == [exit] * len(source.corpus)
    wanted = {}
    for batch in source.eval_batches():
        output = model(jnp.asarray(batch.audio), jnp.asarray(batch.audio_lengths))
        paths = np.asarray(greedy_path(output.exit_logits[exit - 1], output.lengths))
        wanted |= {
            source.corpus.utterances[row].id: Letters().decode(ctc_collapse(path))
            for row, path in zip(batch.index, paths, strict=True)
            if row >= 0
        }
    assert {u.id: u.hypothesis for u in result.utterances} == wanted
    # Another state is another model.
    _, other = nnx.split(exit_model(seed=1, scale=0.5))
    again = decoder.score(other, source)
    assert [u.hypothesis for u in again.utterances] != [u.hypothesis for u in result.utterances]
