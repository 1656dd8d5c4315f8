"""Choosing exits, curves, tuning, the oracle and budgets, on statistics small enough to do by hand."""

import itertools
import json
import math

import numpy as np
import pytest

from edgespeech.errors import InputError
from edgespeech.inference.exit_policy import (
    ExitPolicy,
    ExitStatistics,
    chosen_exits,
    cost_and_wer,
    exit_curve,
    exit_for_budget,
    load_policy,
    oracle_exits,
    save_policy,
    tune_threshold,
)
from edgespeech.inference.exit_predictor import ExitPredictor

# Three exits, four utterances; entropies fall with depth.
ENTROPY = np.array([[0.9, 0.2, 0.6, 0.4], [0.5, 0.1, 0.6, 0.2], [0.3, 0.1, 0.4, 0.1]])
ERRORS = np.array([[4, 0, 3, 2], [2, 0, 3, 1], [1, 1, 2, 1]])
WORDS = np.array([10, 10, 10, 10])
COSTS = np.array([1.0, 2.0, 4.0])
DEV = ExitStatistics(ENTROPY, ERRORS, WORDS, COSTS)


def random_statistics(e=4, u=30):
    rng = np.random.default_rng(0)
    return ExitStatistics(
        rng.uniform(size=(e, u)),
        rng.integers(0, 6, size=(e, u)),
        rng.integers(6, 12, size=u),
        np.cumsum(rng.uniform(1, 2, size=(e, u)), axis=0),
    )


def test_first_exit_that_passes():
    np.testing.assert_array_equal(chosen_exits("entropy", 0.4, ENTROPY), [2, 0, 2, 0])
    np.testing.assert_array_equal(chosen_exits("max_probability", 0.6, ENTROPY), [0, 2, 0, 2])


@pytest.mark.parametrize("rule", ["entropy", "posterior", "max_probability", "similarity"])
def test_extremes_take_the_first_and_the_last_exit(rule):
    lenient = np.inf if rule == "entropy" else -np.inf
    np.testing.assert_array_equal(chosen_exits(rule, lenient, ENTROPY), [0] * 4)
    np.testing.assert_array_equal(chosen_exits(rule, -lenient, ENTROPY), [2] * 4)


def test_cost_and_wer():
    # (4 + 1 + 4 + 1) of 16; 1 + 0 + 2 + 2 errors of 40 words
    assert cost_and_wer(np.array([2, 0, 2, 0]), DEV) == pytest.approx((10 / 16, 5 / 40))
    each = DEV._replace(costs=COSTS[:, None] * np.array([1, 2, 3, 4]))
    assert cost_and_wer(np.array([2, 0, 2, 0]), each)[0] == pytest.approx((4 + 2 + 12 + 4) / 40)


@pytest.mark.parametrize("rule", ["entropy", "posterior"])
def test_curve_has_every_decision(rule):
    statistics = random_statistics()
    curve = exit_curve(rule, statistics)
    first, last = np.zeros(30, int), np.full(30, 3)
    assert (curve.cost[0], curve.wer[0]) == cost_and_wer(first, statistics)
    assert (curve.cost[-1], curve.wer[-1]) == cost_and_wer(last, statistics)
    assert (np.diff(curve.cost) >= 0).all()
    points = set(zip(curve.cost, curve.wer, strict=True))
    for threshold in np.linspace(-0.1, 1.1, 200):
        exits = chosen_exits(rule, threshold, statistics.scores)
        assert cost_and_wer(exits, statistics) in points


def test_long_curves_are_thinned():
    statistics = random_statistics(u=900)
    assert len(exit_curve("entropy", statistics).cost) <= 1002


@pytest.mark.parametrize("rule", ["entropy", "similarity"])
def test_tuning(rule):
    statistics = random_statistics()
    values = [-np.inf, *np.unique(statistics.scores), np.inf]
    points = [cost_and_wer(chosen_exits(rule, v, statistics.scores), statistics) for v in values]
    threshold = tune_threshold(rule, statistics, target_cost=0.7)
    got = cost_and_wer(chosen_exits(rule, threshold, statistics.scores), statistics)
    want = min((wer, cost) for cost, wer in points if cost <= 0.7)
    assert got == (want[1], want[0])
    target = float(np.median([wer for _, wer in points]))
    threshold = tune_threshold(rule, statistics, target_wer=target)
    got = cost_and_wer(chosen_exits(rule, threshold, statistics.scores), statistics)
    assert got == min((cost, wer) for cost, wer in points if wer <= target)


def test_targets_at_both_ends():
    first = tune_threshold("entropy", DEV, target_cost=0.25)
    np.testing.assert_array_equal(chosen_exits("entropy", first, ENTROPY), [0] * 4)
    assert tune_threshold("entropy", DEV, target_cost=1.0) < 0.5


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"target_cost": 0.2}, "target_cost 0.2 is out of reach.*its least is 0.25"),
        ({"target_wer": 0.0}, r"target_wer 0 is out of reach"),
        ({}, "give one of the two"),
        ({"target_cost": 0.5, "target_wer": 0.1}, "give one of the two"),
    ],
)
def test_targets_out_of_reach(target, message):
    with pytest.raises(InputError, match=message):
        tune_threshold("entropy", DEV, **target)


def test_oracle():
    np.testing.assert_array_equal(oracle_exits(DEV), [2, 0, 2, 1])
    np.testing.assert_array_equal(oracle_exits(DEV, price=100.0), [0] * 4)
    # Nothing on its curve is beaten by any other choice of exits.
    for price in (0.0, 0.4, 0.9, 1.5):
        best = oracle_exits(DEV, price)
        rows = np.arange(4)

        def value(exits, price=price, rows=rows):
            return (ERRORS[exits, rows] + price * COSTS[exits]).sum()

        every = min(value(np.array(exits)) for exits in itertools.product(range(3), repeat=4))
        assert value(best) == every


def test_budget():
    costs = (0.2, 0.5, 1.0)
    assert [exit_for_budget(costs, b) for b in (0.2, 0.49, 0.5, 0.9, 1.0, 7)] == [1, 1, 2, 2, 3, 3]
    with pytest.raises(InputError, match=r"budget is 0.1: the first exit alone costs 0.2"):
        exit_for_budget(costs, 0.1)


@pytest.mark.parametrize("threshold", [0.1 + 0.2, math.inf, -math.inf])
def test_policy_round_trip(tmp_path, threshold):
    policy = ExitPolicy("posterior", threshold, n_best=5)
    save_policy(tmp_path, policy, {"data": "dev"})
    assert load_policy(tmp_path) == policy
    content = json.loads((tmp_path / "exit_policy.json").read_text(), parse_constant=pytest.fail)
    assert content["about"] == {"data": "dev"}


def test_a_calibrated_policy_takes_its_predictor_along(tmp_path):
    predictor = ExitPredictor(np.arange(14.0).reshape(2, 7), np.array([0.5, -0.25]))
    save_policy(tmp_path, ExitPolicy("calibrated", 0.75, predictor=predictor))
    found = load_policy(tmp_path)
    assert (found.rule, found.threshold) == ("calibrated", 0.75)
    assert found.predictor is not None
    np.testing.assert_array_equal(found.predictor.weights, predictor.weights)
    np.testing.assert_array_equal(found.predictor.bias, predictor.bias)
    (tmp_path / "exit_predictor.json").unlink()
    with pytest.raises(InputError, match=r"exit_predictor.json is missing"):
        load_policy(tmp_path)
    with pytest.raises(InputError, match="'calibrated' without a predictor"):
        ExitPolicy("calibrated", 0.75)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"format": 2}', '{"format": 1, "rule": "luck", "threshold": "0", "n_best": 1}'],
)
def test_damaged_policy_is_refused(tmp_path, text):
    (tmp_path / "exit_policy.json").write_text(text)
    with pytest.raises(InputError, match=r"exit_policy.json|'luck'"):
        load_policy(tmp_path)


def test_missing_policy(tmp_path):
    with pytest.raises(InputError, match=r"exit_policy.json is missing"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("luck", 0.5), "'luck': choose entropy"),
        (("entropy", math.nan), "threshold is nan"),
        (("posterior", 0.5, 0), "n_best is 0"),
    ],
)
def test_policy_names_what_is_wrong(arguments, message):
    with pytest.raises(InputError, match=message):
        ExitPolicy(*arguments)
