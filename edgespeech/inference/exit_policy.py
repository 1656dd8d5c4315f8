"""When an utterance leaves: rule and threshold, tuned on scores of a dev set, and saved with the model.

Everything here is NumPy on per-exit statistics; the scores themselves are made by `exit_criteria`.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from edgespeech.data.corpus import write_atomically
from edgespeech.errors import InputError
from edgespeech.inference.exit_criteria import ExitRule
from edgespeech.inference.exit_predictor import ExitPredictor, load_predictor, save_predictor

FORMAT = 1
FILE_NAME = "exit_policy.json"
MOST_THRESHOLDS = 1000
CALIBRATED = "calibrated"
PolicyRule = ExitRule | Literal["calibrated"]
RULES: tuple[PolicyRule, ...] = (*get_args(ExitRule), CALIBRATED)


@dataclasses.dataclass(frozen=True)
class ExitPolicy:
    """A rule with its threshold: an utterance takes the first exit that passes, and the last one in any case.

    Attributes:
        rule: see `exit_criteria`; or `calibrated`, see `exit_predictor`.
        threshold: in the rule's unit; `entropy` passes at or below it, the others at or above it. Infinities are
            allowed: one of them takes the first exit always, the other the last.
        n_best: label sequences of the rule `posterior`.
        predictor: of the rule `calibrated`, which needs one.

    Raises:
        InputError: the rule is unknown, the threshold is NaN, n_best is below 1, or the predictor is missing.
    """

    rule: PolicyRule
    threshold: float
    n_best: int = 8
    predictor: ExitPredictor | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        if self.rule not in RULES:
            raise InputError(f"exit rule is {self.rule!r}: choose {', '.join(RULES)}")
        if self.rule == CALIBRATED and self.predictor is None:
            raise InputError(f"exit rule is {self.rule!r} without a predictor: fit one and give it")
        if math.isnan(self.threshold):
            raise InputError("exit threshold is nan: it must be a number or an infinity")
        if self.n_best < 1:
            raise InputError(f"n_best is {self.n_best}: it must be at least 1")


def passes(rule: PolicyRule, scores, threshold):
    """Which scores let an utterance leave: `<= threshold` for the entropy, `>= threshold` for the other rules.

    Works on NumPy's arrays and on JAX's.
    """
    return scores <= threshold if rule == "entropy" else scores >= threshold


class ExitStatistics(NamedTuple):
    """What a dev set says about e exits and u utterances.

    Attributes:
        scores: `[e u]` of one rule.
        errors: `[e u]`, word errors of each exit's transcript.
        words: `[u]`, of the reference.
        costs: `[e]` or `[e u]`, what it takes to reach each exit, growing, in any unit.
    """

    scores: np.ndarray
    errors: np.ndarray
    words: np.ndarray
    costs: np.ndarray


class ExitCurve(NamedTuple):
    """Word error rate against compute, one point a threshold, from the first exit's end to the last exit's.

    Attributes:
        thresholds: `[k]`.
        cost: `[k]`, fraction of the compute of the last exit.
        wer: `[k]`, a fraction.
    """

    thresholds: np.ndarray
    cost: np.ndarray
    wer: np.ndarray


def chosen_exits(rule: PolicyRule, threshold: float, scores: np.ndarray) -> np.ndarray:
    """The first exit of each utterance that passes, or the last: `[e u] -> [u]`, counted from 0."""
    passing = np.array(passes(rule, scores, threshold))
    passing[-1] = True
    return np.argmax(passing, axis=0)


def cost_and_wer(exits: np.ndarray, statistics: ExitStatistics) -> tuple[float, float]:
    """Fraction of the last exit's compute, and word error rate, if utterance u takes `exits[u]` (counted from 0)."""
    utterances = np.arange(len(exits))
    costs = np.broadcast_to(_by_exit(statistics), statistics.errors.shape)
    errors = statistics.errors[exits, utterances].sum()
    cost = costs[exits, utterances].sum() / costs[-1].sum()
    return float(cost), float(errors / statistics.words.sum())


def exit_curve(rule: PolicyRule, statistics: ExitStatistics) -> ExitCurve:
    """The curve of a rule: every threshold that changes a decision, at most about a thousand."""
    values = np.unique(statistics.scores[:-1])
    if len(values) > MOST_THRESHOLDS:
        values = values[np.linspace(0, len(values) - 1, MOST_THRESHOLDS).round().astype(int)]
    thresholds = np.concatenate([[-np.inf], values, [np.inf]])
    if rule != "entropy":
        thresholds = thresholds[::-1]
    points = [
        cost_and_wer(chosen_exits(rule, threshold, statistics.scores), statistics)
        for threshold in thresholds
    ]
    cost, wer = np.array(points).T
    # Strict thresholds come first: the curve starts at the last exit and is given the other way round.
    return ExitCurve(thresholds[::-1], cost[::-1], wer[::-1])


def tune_threshold(
    rule: PolicyRule,
    statistics: ExitStatistics,
    *,
    target_cost: float | None = None,
    target_wer: float | None = None,
) -> float:
    """The threshold with the lowest WER at a cost of at most `target_cost`, or the cheapest one at `target_wer`.

    Where several do equally well, the one that also does best in what is limited.

    Args:
        rule: of the scores.
        statistics: of a dev set.
        target_cost: fraction of the last exit's compute.
        target_wer: a fraction.

    Raises:
        InputError: not exactly one target is given, or no threshold reaches it (the message says what does).
    """
    curve = exit_curve(rule, statistics)
    if target_cost is not None and target_wer is None:
        name, target, limited, best = "target_cost", target_cost, curve.cost, curve.wer
    elif target_wer is not None and target_cost is None:
        name, target, limited, best = "target_wer", target_wer, curve.wer, curve.cost
    else:
        raise InputError(
            f"target_cost is {target_cost} and target_wer {target_wer}: give one of the two"
        )
    # Fractions that are equal in exact arithmetic may differ in their last bit.
    reached = np.flatnonzero(limited <= target + 1e-12)
    if not len(reached):
        raise InputError(
            f"{name} {target:g} is out of reach of the rule {rule}: its least is {limited.min():.4g}; ask for no less"
        )
    order = np.lexsort((limited[reached], best[reached]))
    return float(curve.thresholds[reached[order[0]]])


def oracle_exits(statistics: ExitStatistics, price: float = 0.0) -> np.ndarray:
    """The exits that someone who knows the references takes: `argmin_m errors + price * cost`, `[u]`, from 0.

    Among equals the cheaper one. At price 0 these are the fewest errors and the least compute for them; prices above
    it draw the oracle's curve.

    Args:
        statistics: the scores are not used.
        price: word errors that one unit of cost is worth, at least 0.
    """
    return np.argmin(statistics.errors + price * _by_exit(statistics), axis=0)


def exit_for_budget(costs: Sequence[float], budget: float) -> int:
    """The deepest exit that fits a budget, counted from 1.

    Args:
        costs: of each exit, growing: fractions of compute, or milliseconds per second of audio.
        budget: in the same unit.

    Raises:
        InputError: not even the first exit fits.
    """
    fitting = [exit for exit, cost in enumerate(costs, 1) if cost <= budget]
    if not fitting:
        raise InputError(
            f"budget is {budget:g}: the first exit alone costs {costs[0]:g}; allow at least that"
        )
    return fitting[-1]


def save_policy(folder: str | Path, policy: ExitPolicy, about: dict | None = None) -> None:
    """Writes `exit_policy.json` into a model's folder, and `exit_predictor.json` where the policy has a predictor.

    Args:
        folder: exists.
        policy: what is saved.
        about: how it was tuned (data, targets), plain JSON.
    """
    if policy.predictor is not None:
        save_predictor(folder, policy.predictor)
    # JSON has no infinities: the threshold is text, exact to the bit.
    content = {
        "format": FORMAT,
        "rule": policy.rule,
        "threshold": repr(float(policy.threshold)),
        "n_best": policy.n_best,
        "about": about or {},
    }
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(Path(folder) / FILE_NAME, lambda file: file.write(text.encode()))


def load_policy(folder: str | Path) -> ExitPolicy:
    """Reads what `save_policy` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = Path(folder) / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        predictor = load_predictor(folder) if content["rule"] == CALIBRATED else None
        return ExitPolicy(
            content["rule"], float(content["threshold"]), int(content["n_best"]), predictor
        )
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: tune a threshold and save it first") from error
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is not a saved exit policy ({error!r}): save it again") from error


def _by_exit(statistics: ExitStatistics) -> np.ndarray:
    costs = np.asarray(statistics.costs, float)
    return costs[:, None] if costs.ndim == 1 else costs
