"""Curves of exit rules against plain loops over thresholds and utterances, on random scores."""

import dataclasses

import jiwer
import numpy as np
import pytest

from edgespeech.evaluation.exit_curves import PRICES, analyse
from edgespeech.evaluation.exit_plots import wer_against_compute, wer_against_layer
from edgespeech.evaluation.exit_report import _gaps
from edgespeech.evaluation.exit_scores import ExitScores, load_exit_scores, save_exit_scores
from edgespeech.evaluation.wer import score
from edgespeech.inference.exit_predictor import FEATURES, exit_probabilities
from edgespeech.models.exit_macs import exit_macs
from tests.support.tiny_exits import exit_config

CONFIG = exit_config(layers_per_exit=2)
RULES = ("entropy", "posterior", "max_probability", "similarity", "patience")


def random_scores(seed: int, u: int = 24) -> ExitScores:
    """Three exits that get better with depth, and an entropy that knows a little of it."""
    rng = np.random.default_rng(seed)
    references = ["A B C D E F"[: 2 * rng.integers(2, 7) - 1] for _ in range(u)]
    ids = [f"{seed}-{row}" for row in range(u)]
    results, wrong = [], np.zeros((3, u))
    for m, rate in enumerate((0.6, 0.35, 0.25)):
        texts = []
        for row, reference in enumerate(references):
            words = [w if rng.uniform() > rate else "X" for w in reference.split()]
            wrong[m, row] = words.count("X") / len(words)
            texts.append(" ".join(words))
        results.append(score(ids, references, texts))
    noise = rng.uniform(size=(5, 3, u))
    rules = {
        "entropy": 0.1 + wrong + 0.5 * noise[0],
        "posterior": 1 - 0.5 * wrong - 0.3 * noise[1],
        "max_probability": 1 - 0.4 * wrong - 0.4 * noise[2],
        "similarity": noise[3],
        "patience": np.cumsum(noise[4] > 0.5, axis=0) + 1.0,
    }
    samples = rng.integers(3000, 9000, size=u)
    frames = np.array([CONFIG.num_frames(int(s)) for s in samples])
    features = rng.normal(size=(3, u, len(FEATURES)))
    features[..., 0] = np.log(rules["entropy"])
    return ExitScores(tuple(results), rules, features, frames, samples)


DEV, TEST = random_scores(1), random_scores(2)
REPORT, PREDICTOR = analyse(CONFIG, DEV, TEST)


def plain_point(scores: ExitScores, exits) -> tuple[float, float, float]:
    """WER by jiwer, MACs per second of audio, and their share of the whole pass's, utterance by utterance."""
    rows = [scores.results[m].utterances[u] for u, m in enumerate(exits)]
    wer = jiwer.wer([r.reference for r in rows], [r.hypothesis for r in rows])
    macs = [exit_macs(CONFIG, int(s)) for s in scores.samples]
    spent = sum(row[m] for row, m in zip(macs, exits, strict=True))
    return wer, spent / (scores.samples.sum() / 16000), spent / sum(row[-1] for row in macs)


def plain_exits(rule: str, threshold: float, values) -> list[int]:
    exits = []
    for row in np.transpose(values):
        leaves = [v <= threshold if rule == "entropy" else v >= threshold for v in row]
        leaves[-1] = True
        exits.append(leaves.index(True))
    return exits


def values_of(scores: ExitScores, rule: str) -> np.ndarray:
    if rule == "calibrated":
        return exit_probabilities(PREDICTOR, scores.features)
    return scores.rules[rule]


def test_fixed_exits():
    for m, row in enumerate(REPORT["exits"]):
        wer, macs, cost = plain_point(TEST, [m] * len(TEST.words))
        assert (row["exit"], row["layer"]) == (m + 1, 2 * (m + 1))
        assert row["wer"] == pytest.approx(wer)
        assert row["macs_per_second"] == pytest.approx(macs)
        assert row["cost"] == pytest.approx(cost)
        assert (row["dev_wer"], row["dev_cost"]) == pytest.approx(
            plain_point(DEV, [m] * len(DEV.words))[::2]
        )


@pytest.mark.parametrize("rule", [*RULES, "calibrated"])
def test_rules_are_tuned_on_dev_and_scored_on_test(rule):
    curve = REPORT["curves"][rule]
    fixed = [row["dev_cost"] for row in REPORT["exits"]]
    assert [row["budget"] for row in curve] == pytest.approx(
        [fixed[0], (fixed[0] + fixed[1]) / 2, fixed[1], (fixed[1] + fixed[2]) / 2, fixed[2]]
    )
    dev, test = values_of(DEV, rule), values_of(TEST, rule)
    every = [
        plain_point(DEV, plain_exits(rule, t, dev)) for t in [-np.inf, *np.unique(dev), np.inf]
    ]
    for row in curve:
        threshold = float(row["threshold"])
        dev_wer, _, dev_cost = plain_point(DEV, plain_exits(rule, threshold, dev))
        assert (row["dev_wer"], row["dev_cost"]) == pytest.approx((dev_wer, dev_cost))
        assert dev_cost <= row["budget"] + 1e-9
        assert dev_wer == pytest.approx(min(w for w, _, c in every if c <= row["budget"] + 1e-9))
        exits = plain_exits(rule, threshold, test)
        wer, macs, cost = plain_point(TEST, exits)
        assert (row["wer"], row["cost"]) == pytest.approx((wer, cost))
        assert row["macs_per_second"] == pytest.approx(macs)
        assert row["mean_exit"] == pytest.approx(np.mean(exits) + 1)


def test_oracle():
    rows = REPORT["oracle"]
    macs = np.array([exit_macs(CONFIG, int(s)) for s in TEST.samples]).T
    full = macs[-1].mean()
    for row in rows:
        assert row["price"] in PRICES
        exits = np.argmin(TEST.errors + row["price"] * macs / full, axis=0)
        wer, spent, cost = plain_point(TEST, exits)
        assert (row["wer"], row["cost"]) == pytest.approx((wer, cost))
        assert row["macs_per_second"] == pytest.approx(spent)
    # From the first exit for everyone to the fewest errors there are.
    assert rows[0]["cost"] == pytest.approx(REPORT["exits"][0]["cost"])
    assert rows[-1]["wer"] == pytest.approx(TEST.errors.min(axis=0).sum() / TEST.words.sum())
    assert (np.diff([row["wer"] for row in rows]) <= 0).all()


def test_gaps():
    reached = 0
    best = REPORT["best_fixed"] - 1
    assert best == np.argmin([row["dev_wer"] for row in REPORT["exits"]])
    fixed = REPORT["exits"][best]
    oracle_wer = min(r["wer"] for r in REPORT["oracle"] if r["cost"] <= fixed["cost"])
    oracle_cost = min(r["cost"] for r in REPORT["oracle"] if r["wer"] <= fixed["wer"])
    assert oracle_wer < fixed["wer"]
    for rule, gap in REPORT["gaps"].items():
        row = next(r for r in REPORT["curves"][rule] if r["budget"] == fixed["dev_cost"])
        found = gap["equal_compute"]
        assert (found["wer"], found["cost"]) == (row["wer"], row["cost"])
        assert found["difference"] == pytest.approx(row["wer"] - fixed["wer"])
        assert found["ci"][0] <= found["difference"] <= found["ci"][1]
        closed = (fixed["wer"] - row["wer"]) / (fixed["wer"] - oracle_wer)
        assert found["closed"] == pytest.approx(closed)
        won = possible = 0.0
        for exit in REPORT["exits"]:
            row = next(r for r in REPORT["curves"][rule] if r["budget"] == exit["dev_cost"])
            won += exit["wer"] - row["wer"]
            possible += exit["wer"] - min(
                r["wer"] for r in REPORT["oracle"] if r["cost"] <= exit["cost"]
            )
        assert gap["all_budgets"]["closed"] == pytest.approx(won / possible)
        found = gap["equal_wer"]
        dev = values_of(DEV, rule)
        points = [
            plain_point(DEV, plain_exits(rule, t, dev)) for t in [-np.inf, *np.unique(dev), np.inf]
        ]
        as_good = [c for w, _, c in points if w <= fixed["dev_wer"] + 1e-9]
        if not as_good:
            assert found is None
            continue
        exits = plain_exits(rule, float(found["threshold"]), dev)
        assert plain_point(DEV, exits)[2] == pytest.approx(min(as_good))
        closed = (fixed["cost"] - found["cost"]) / (fixed["cost"] - oracle_cost)
        assert found["closed"] == pytest.approx(closed)
        reached += 1
    assert 0 < reached < len(RULES) + 1


def known_scores(seed: int, u: int = 200) -> ExitScores:
    """Each utterance is right at one exit alone: 30 % at the first, 30 % at the second, 40 % at the last.

    The first exit's share of labelled frames and the second one's change of the transcript tell which; all else is
    noise.
    """
    rng = np.random.default_rng(seed)
    right = rng.permutation(np.repeat([0, 1, 2], [u * 3 // 10, u * 3 // 10, u * 4 // 10]))
    ids = [f"{seed}-{row}" for row in range(u)]
    texts = [["A B C D" if r == m else "A X D" for r in right] for m in range(3)]
    results = tuple(score(ids, ["A B C D"] * u, heard) for heard in texts)
    features = rng.normal(size=(3, u, len(FEATURES)))
    features[0, :, FEATURES.index("log_labelled")] = np.where(right == 0, -0.5, -1.5)
    features[1, :, FEATURES.index("change")] = np.where(right == 2, 0.4, 0.0)
    rules = {rule: rng.uniform(1, 2, size=(3, u)) for rule in RULES}
    samples = np.full(u, 6000)
    return ExitScores(results, rules, features, CONFIG.num_frames(6000) + 0 * samples, samples)


def test_a_rule_that_sees_what_matters_closes_the_gap_for_other_speakers():
    dev, test = known_scores(1), known_scores(2)
    report, _ = analyse(CONFIG, dev, test)
    assert report["best_fixed"] == 3
    assert report["exits"][2]["wer"] == pytest.approx(0.6 * 2 / 4)
    found = report["gaps"]["calibrated"]["equal_compute"]
    assert found["oracle_wer"] == 0.0
    # The oracle's exits but for a few utterances: the threshold is one of dev's scores.
    assert 0.95 < found["closed"] <= 1.0
    assert found["mean_exit"] == pytest.approx(0.3 * 1 + 0.3 * 2 + 0.4 * 3, abs=0.05)
    assert found["cost"] < 0.75
    for rule in RULES:
        assert report["gaps"][rule]["equal_compute"]["closed"] < 0.5
    # Without the two features it is as blind as the others.
    blind = [scores._replace(features=scores.features[..., :5]) for scores in (dev, test)]
    report_blind, _ = analyse(CONFIG, *blind)
    assert report_blind["gaps"]["calibrated"]["equal_compute"]["closed"] < 0.5
    text = _gaps(report | {"name": "model"}, "")
    assert f"| calibrated | {100 * found['wer']:.2f} % at" in text
    assert "At least half of the WER gap at its compute is closed by: calibrated." in text


def test_equal_exits_have_no_gap():
    same = TEST._replace(results=(TEST.results[1],) * 3)
    report, _ = analyse(CONFIG, DEV._replace(results=(DEV.results[1],) * 3), same)
    assert report["best_fixed"] == 1  # the cheapest of equals
    for rule in (*RULES, "calibrated"):
        assert report["gaps"][rule]["equal_compute"]["closed"] is None
        assert report["gaps"][rule]["equal_wer"]["closed"] is None
        assert report["gaps"][rule]["all_budgets"]["closed"] is None


def test_scores_round_trip(tmp_path):
    assert load_exit_scores(tmp_path, "model_dev") is None
    save_exit_scores(tmp_path, "model_dev", TEST)
    found = load_exit_scores(tmp_path, "model_dev")
    assert found is not None
    assert [r.utterances for r in found.results] == [r.utterances for r in TEST.results]
    assert found.rules.keys() == TEST.rules.keys()
    for rule in RULES:
        np.testing.assert_array_equal(found.rules[rule], TEST.rules[rule])
    np.testing.assert_array_equal(found.samples, TEST.samples)
    np.testing.assert_array_equal(found.features, TEST.features)
    np.testing.assert_array_equal(found.frames, TEST.frames)
    # Scores of a version that knew fewer features are made again.
    save_exit_scores(tmp_path, "model_dev", TEST._replace(features=TEST.features[..., :5]))
    assert load_exit_scores(tmp_path, "model_dev") is None


def test_plots(tmp_path):
    rows = [
        row | {"ci": list(result.ci)}
        for row, result in zip(REPORT["exits"], TEST.results, strict=True)
    ]
    model = {"name": "model", "config": dataclasses.asdict(CONFIG), **REPORT, "exits": rows}
    wer_against_layer(tmp_path / "layer.png", [model, model | {"name": "other"}], "random data")
    wer_against_compute(tmp_path / "compute.png", model, "random data")
    for name in ("layer", "compute"):
        content = (tmp_path / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(content) > 5000
