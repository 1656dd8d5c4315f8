"""What exit rules give at equal compute: thresholds are chosen on a dev split and scored on a test split.

Compute is in multiply-accumulates, from `exit_macs`: matrix products and convolutions of the encoder and of every head
on the way. What a rule itself costs (the beam of `posterior` above all) is not in it.
"""

import itertools
from typing import Any

import numpy as np

from edgespeech.errors import InputError
from edgespeech.evaluation.exit_scores import ExitScores
from edgespeech.evaluation.wer import WerResult, paired_bootstrap, score
from edgespeech.inference.exit_policy import (
    CALIBRATED,
    RULES,
    ExitStatistics,
    PolicyRule,
    chosen_exits,
    cost_and_wer,
    oracle_exits,
    tune_threshold,
)
from edgespeech.inference.exit_predictor import (
    ExitPredictor,
    exit_probabilities,
    fit_exit_predictor,
)
from edgespeech.models.exit_macs import ExitConfig, exit_macs
from edgespeech.types import SAMPLE_RATE

# Word errors that the compute of a whole pass is worth: prices of the oracle, densest where errors are single words.
PRICES = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 121)])


def with_calibrated(scores: ExitScores, predictor: ExitPredictor) -> ExitScores:
    """The scores with those of the rule `calibrated`."""
    calibrated = exit_probabilities(predictor, scores.features)
    return scores._replace(rules={**scores.rules, CALIBRATED: calibrated})


def statistics(config: ExitConfig, scores: ExitScores) -> ExitStatistics:
    """What `exit_policy` works on, still without a rule's scores; costs are multiply-accumulates `[e u]`."""
    costs = np.array([exit_macs(config, int(samples)) for samples in scores.samples], float).T
    return ExitStatistics(np.zeros(costs.shape), scores.errors, scores.words, costs)


def analyse(
    config: ExitConfig, dev: ExitScores, test: ExitScores, penalty: float = 1.0
) -> tuple[dict[str, Any], ExitPredictor]:
    """Exits, curves of the rules, the oracle's curve, and how much of the gap between the two each rule closes.

    Every rule is tuned on dev for the lowest WER within a budget, once for each budget: the compute of every fixed exit
    and the middle between two neighbours. The predictor of `calibrated` is fitted on dev, too.

    Args:
        config: of the model.
        dev: what thresholds and predictor are chosen on.
        test: what is reported.
        penalty: of the predictor.

    Returns:
        For the report, rates as fractions and `cost` as a fraction of the last exit's compute: `exits`, `curves` by
        rule, `oracle`, `best_fixed`, `gaps` by rule, see `_gaps`; and the predictor.
    """
    predictor = fit_exit_predictor(dev.features, dev.errors, penalty)
    dev, test = with_calibrated(dev, predictor), with_calibrated(test, predictor)
    on_dev, on_test = statistics(config, dev), statistics(config, test)
    full = on_test.costs[-1].sum() / (test.samples.sum() / SAMPLE_RATE)

    def point(exits: np.ndarray) -> dict[str, float]:
        cost, wer = cost_and_wer(exits, on_test)
        return {"cost": cost, "macs_per_second": cost * full, "wer": wer}

    def always(exit: int, like: ExitScores) -> np.ndarray:
        return np.full(len(like.words), exit)

    dev_fixed = [cost_and_wer(always(m, dev), on_dev) for m in range(len(dev.results))]
    exits = [
        {
            "exit": m + 1,
            "layer": config.exit_layers[m],
            **point(always(m, test)),
            "dev_wer": wer,
            "dev_cost": cost,
        }
        for m, (cost, wer) in enumerate(dev_fixed)
    ]
    fixed_costs = [cost for cost, _ in dev_fixed]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(fixed_costs)]
    budgets = sorted([*fixed_costs, *middles])

    def tuned(rule: PolicyRule, **target: float) -> dict[str, Any]:
        scores = dev.rules[rule]
        threshold = tune_threshold(rule, on_dev._replace(scores=scores), **target)
        dev_cost, dev_wer = cost_and_wer(chosen_exits(rule, threshold, scores), on_dev)
        chosen = chosen_exits(rule, threshold, test.rules[rule])
        # Text, because JSON has no infinities.
        row = {"threshold": repr(threshold), "dev_cost": dev_cost, "dev_wer": dev_wer}
        return row | point(chosen) | {"mean_exit": float(chosen.mean() + 1)}

    curves = {
        rule: [{"budget": budget} | tuned(rule, target_cost=budget) for budget in budgets]
        for rule in RULES
    }
    oracle = oracle_curve(on_test, point)
    best = int(np.lexsort((fixed_costs, [wer for _, wer in dev_fixed]))[0])
    gaps = {
        rule: _gaps(rule, best, exits, oracle, curves[rule], dev, test, tuned) for rule in RULES
    }
    report = {
        "exits": exits,
        "curves": curves,
        "oracle": oracle,
        "best_fixed": best + 1,
        "gaps": gaps,
    }
    return report, predictor


def oracle_curve(test: ExitStatistics, point) -> list[dict[str, float]]:
    """Points of someone who knows the references, cheapest first: `argmin errors + price * cost` for every price."""
    # As fractions of the mean compute of a whole pass, so that a price is a number of words.
    priced = test._replace(costs=test.costs / test.costs[-1].mean())
    points = {}
    for price in PRICES:
        found = point(oracle_exits(priced, float(price)))
        points.setdefault((found["cost"], found["wer"]), {"price": float(price), **found})
    return [points[key] for key in sorted(points)]


def _gaps(rule, best, exits, oracle, curve, dev, test, tuned) -> dict[str, Any]:
    """How far a rule gets from a fixed exit to the oracle; `closed` is (fixed - rule) / (fixed - oracle), null: no gap.

    `equal_compute`: in WER, all three within the compute of the best fixed exit, which is chosen on dev.
    `equal_wer`: in compute, none with a higher WER than that exit.
    `all_budgets`: in WER, each term summed over the budgets of all fixed exits: how the whole curve does.
    """
    fixed = exits[best]

    def at_budget(row) -> tuple[dict[str, Any], float]:
        """The rule's row within the compute of a fixed exit, and the oracle's WER."""
        own = next(point for point in curve if point["budget"] == row["dev_cost"])
        return own, min(p["wer"] for p in oracle if p["cost"] <= row["cost"] + 1e-12)

    at_compute, best_oracle = at_budget(fixed)
    everywhere = [(row["wer"], *at_budget(row)) for row in exits]
    all_budgets = {
        "closed": _share(
            sum(wer - own["wer"] for wer, own, _ in everywhere),
            sum(wer - oracle_wer for wer, _, oracle_wer in everywhere),
        )
    }
    chosen = chosen_exits(rule, float(at_compute["threshold"]), test.rules[rule])
    paired = paired_bootstrap(test.results[best], mixed(test, chosen))
    equal_compute = {
        **{key: at_compute[key] for key in ("threshold", "cost", "wer", "mean_exit")},
        "oracle_wer": best_oracle,
        "difference": paired.difference,
        "ci": list(paired.ci),
        "closed": _share(fixed["wer"] - at_compute["wer"], fixed["wer"] - best_oracle),
    }
    try:
        at_wer = tuned(rule, target_wer=fixed["dev_wer"])
    except InputError:  # no threshold is as good as the best fixed exit
        return {"equal_compute": equal_compute, "equal_wer": None, "all_budgets": all_budgets}
    cheapest = min(row["cost"] for row in oracle if row["wer"] <= fixed["wer"] + 1e-12)
    equal_wer = {
        **{key: at_wer[key] for key in ("threshold", "cost", "wer", "mean_exit")},
        "oracle_cost": cheapest,
        "closed": _share(fixed["cost"] - at_wer["cost"], fixed["cost"] - cheapest),
    }
    return {"equal_compute": equal_compute, "equal_wer": equal_wer, "all_budgets": all_budgets}


def mixed(scores: ExitScores, exits: np.ndarray) -> WerResult:
    """Word errors when utterance u takes `exits[u]`, counted from 0."""
    rows = [scores.results[m].utterances[u] for u, m in enumerate(exits)]
    return score([r.id for r in rows], [r.reference for r in rows], [r.hypothesis for r in rows])


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
