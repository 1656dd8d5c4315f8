"""Segments, regrouping and the single program against a pass through the whole model."""

import functools
from typing import get_args

import jax
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.inference.early_exit import EarlyExit, SingleProgramEarlyExit
from edgespeech.inference.exit_criteria import ExitRule, all_exit_scores
from edgespeech.inference.exit_policy import ExitPolicy, chosen_exits, exit_for_budget
from edgespeech.inference.exit_predictor import FEATURES, ExitPredictor, all_exit_features
from edgespeech.models.exit_macs import exit_macs
from tests.support.tiny_exits import exit_audio, exit_model

# 5, 40, 4, 1, 20 frames and none behind the front end.
SAMPLES = (3520, 25_920, 2880, 960, 13_120, 100)
N_BEST = 3


@functools.cache
def model():
    return exit_model(scale=0.5)


@functools.cache
def traces():
    """Scores `[e b]` and transcripts of every exit by rule, from the model's own call."""

    @jax.jit
    def run(state, audio, lengths):
        out = nnx.merge(graphdef, state)(audio, lengths)
        passed = out.embedded, out.hidden, out.exit_logits, out.lengths
        traces = {rule: all_exit_scores(rule, *passed, N_BEST) for rule in get_args(ExitRule)}
        return traces | {"features": all_exit_features(*passed)}

    graphdef, state = nnx.split(model())
    return jax.device_get(run(state, *exit_audio(SAMPLES)))


def between(values):
    """A threshold in the widest gap of the middle half of some scores: rounding moves nothing across it."""
    values = np.sort(np.unique(np.round(values, 4)))
    middle = values[len(values) // 4 : -(len(values) // 4) or None]
    gap = np.argmax(np.diff(middle))
    return float(middle[gap : gap + 2].mean())


def assert_result(result, rule, threshold, rows, last=3):
    scores, tokens = traces()[rule]
    exits = np.minimum(chosen_exits(rule, threshold, scores[:last]), last - 1)
    np.testing.assert_array_equal(result.exits, exits[rows] + 1)
    for got, score, row in zip(result.tokens, result.scores, rows, strict=True):
        want = tokens[exits[row], row]
        np.testing.assert_array_equal(got, want[want != 0])
        assert score == pytest.approx(scores[exits[row], row], abs=1e-4)


@pytest.mark.parametrize("rule", get_args(ExitRule))
def test_batch_takes_the_exits_of_the_whole_pass(rule):
    scores, _ = traces()[rule]
    threshold = 2.0 if rule == "patience" else between(scores[:2])
    policy = ExitPolicy(rule, threshold, N_BEST)
    result = EarlyExit(model(), policy)(*exit_audio(SAMPLES))
    assert_result(result, rule, threshold, range(len(SAMPLES)))
    assert len(set(result.exits.tolist())) > 1


def calibrated():
    """A predictor with weights that spread the probabilities, its probabilities `[e b]`, and a threshold."""
    rng = np.random.default_rng(0)
    x = np.float64(traces()["features"])
    weights = rng.normal(size=(2, len(FEATURES)))
    bias = -np.einsum("euf,ef->eu", x[:2], weights).mean(1)
    p = 1.0 / (1.0 + np.exp(-(np.einsum("euf,ef->eu", x[:2], weights) + bias[:, None])))
    return ExitPredictor(weights, bias), np.concatenate([p, np.ones((1, len(SAMPLES)))])


@pytest.mark.parametrize("program", [EarlyExit, SingleProgramEarlyExit])
def test_the_calibrated_rule_weighs_what_the_other_rules_score(program):
    predictor, probabilities = calibrated()
    threshold = between(probabilities[:2])
    wanted = np.argmax(probabilities >= threshold, axis=0)
    assert len(set(wanted.tolist())) > 1
    run = program(model(), ExitPolicy("calibrated", threshold, predictor=predictor))
    audio, lengths = exit_audio(SAMPLES)
    groups = [range(len(SAMPLES))] if program is EarlyExit else [[row] for row in range(5)]
    for rows in groups:
        result = run(audio[list(rows)], lengths[list(rows)])
        for exit, score, row in zip(result.exits, result.scores, rows, strict=True):
            assert exit == wanted[row] + 1
            assert score == pytest.approx(probabilities[wanted[row], row], abs=1e-3)


def test_a_predictor_of_other_exits():
    predictor = ExitPredictor(np.zeros((3, len(FEATURES))), np.zeros(3))
    with pytest.raises(InputError, match="predictor is for 4 exits and the model has 3"):
        EarlyExit(model(), ExitPolicy("calibrated", 0.5, predictor=predictor))


@pytest.mark.parametrize("rule", [*get_args(ExitRule), "calibrated"])
def test_looking_ahead_changes_nothing(rule):
    predictor, probabilities = calibrated()
    scores = probabilities if rule == "calibrated" else traces()[rule][0]
    threshold = 2.0 if rule == "patience" else between(scores[:2])
    policy = ExitPolicy(rule, threshold, N_BEST, predictor)
    audio, lengths = exit_audio(SAMPLES)
    found = [EarlyExit(model(), policy, ahead)(audio, lengths) for ahead in (0, 1)]
    assert len(set(found[0].exits.tolist())) > 1
    np.testing.assert_array_equal(found[1].exits, found[0].exits)
    # Other rows share a program with them: equal up to rounding.
    np.testing.assert_allclose(found[1].scores, found[0].scores, atol=1e-4)
    for got, want in zip(found[1].tokens, found[0].tokens, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("program", [EarlyExit, SingleProgramEarlyExit])
def test_alone_is_as_in_the_batch(program):
    threshold = between(traces()["entropy"][0][:2])
    run = program(model(), ExitPolicy("entropy", threshold))
    audio, lengths = exit_audio(SAMPLES)
    for row in (0, 1, 3):
        t = lengths[row]
        result = run(audio[row : row + 1, :t], lengths[row : row + 1])
        assert_result(result, "entropy", threshold, [row])


def test_extremes_and_the_deepest_exit_allowed():
    audio, lengths = exit_audio(SAMPLES)
    for threshold, want in ((np.inf, 1), (-np.inf, 3)):
        run = EarlyExit(model(), ExitPolicy("entropy", threshold))
        assert run(audio, lengths).exits.tolist() == [want] * len(SAMPLES)
        single = SingleProgramEarlyExit(model(), ExitPolicy("entropy", threshold))
        assert single(audio[:1], lengths[:1]).exits.tolist() == [want]
        if want == 3:
            result = run(audio, lengths, max_exit=2)
            assert_result(result, "entropy", -np.inf, range(len(SAMPLES)), last=2)
            assert single(audio[:1], lengths[:1], max_exit=2).exits.tolist() == [2]


def test_budget_in_fractions_of_compute():
    costs = np.array(exit_macs(model().config, 16_000), float)
    run = EarlyExit(model(), ExitPolicy("entropy", -np.inf))
    deepest = exit_for_budget(costs / costs[-1], 0.8)
    assert deepest == 2
    assert set(run(*exit_audio(SAMPLES), max_exit=deepest).exits) == {2}


def watched(run: EarlyExit, shapes: list) -> EarlyExit:
    """The same, noting the shape that goes into each segment."""

    def watch(program):
        def call(leaves, limit, progress):
            shapes.append(progress.x.shape[:2])
            return program(leaves, limit, progress)

        return call

    run._segments = [(watch(program), leaves) for program, leaves in run._segments]
    return run


def test_survivors_are_regrouped():
    shapes = []
    # Three of the four leave at the first exit; the one that goes on has 5 frames of 40.
    audio, lengths = exit_audio(SAMPLES)
    scores, _ = traces()["entropy"]
    rows = np.array([0, 1, 3, 4])
    assert scores[0, 0] > 0
    threshold = np.sort(scores[0, rows])[-1] - 1e-3
    strict = int(rows[np.argmax(scores[0, rows])])
    policy = ExitPolicy("entropy", float(threshold))
    watched(EarlyExit(model(), policy), shapes)(audio[rows], lengths[rows])
    frames = model().config.num_frames(SAMPLES[strict])
    assert shapes[0] == (4, 40)
    assert shapes[1] == (1, 32 if frames <= 32 else 40)
    shapes.clear()
    everyone = ExitPolicy("entropy", np.inf)
    watched(EarlyExit(model(), everyone), shapes)(audio[rows], lengths[rows])
    assert shapes == [(4, 40)]


@pytest.mark.parametrize(("threshold", "max_exit"), [(np.inf, 3), (-np.inf, 3), (-np.inf, 2)])
def test_looking_ahead_wastes_a_segment_at_most(threshold, max_exit):
    shapes = []
    audio, lengths = exit_audio(SAMPLES[:1])
    policy = ExitPolicy("entropy", threshold)
    want = EarlyExit(model(), policy)(audio, lengths, max_exit)
    found = watched(EarlyExit(model(), policy, lookahead=1), shapes)(audio, lengths, max_exit)
    assert found.exits.tolist() == want.exits.tolist() == [1 if threshold > 0 else max_exit]
    # The same programs on the same arrays: equal to the bit.
    np.testing.assert_array_equal(found.scores, want.scores)
    np.testing.assert_array_equal(found.tokens[0], want.tokens[0])
    assert len(shapes) == min(int(want.exits[0]) + 1, max_exit)


@pytest.mark.parametrize("lookahead", [-1, 2])
def test_lookahead_is_0_or_1(lookahead):
    with pytest.raises(InputError, match=f"lookahead is {lookahead}: choose 0 or 1"):
        EarlyExit(model(), ExitPolicy("entropy", 0.0), lookahead)


def test_equal_segments_share_a_compilation():
    run = EarlyExit(exit_model(branches="none"), ExitPolicy("max_probability", np.inf))
    (program,) = {program for program, _ in run._segments}
    assert run(*exit_audio((3520, 2880))).exits.tolist() == [3, 3]
    assert program._cache_size() == 1


@pytest.mark.parametrize("max_exit", [0, 4])
def test_exits_that_are_not_there(max_exit):
    run = EarlyExit(model(), ExitPolicy("entropy", 0.0))
    with pytest.raises(InputError, match=f"max_exit is {max_exit}: choose 1 to 3"):
        run(*exit_audio((3520,)), max_exit=max_exit)


def test_single_program_takes_one_utterance():
    run = SingleProgramEarlyExit(model(), ExitPolicy("entropy", 0.0))
    with pytest.raises(InputError, match="a batch of 2"):
        run(*exit_audio((3520, 2880)))
