"""What a sweep comes to: table.md and plot.png."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from edgespeech.data.corpus import write_atomically
from edgespeech.evaluation.drawing import BLUE, ORANGE, new_figure, save_figure
from edgespeech.evaluation.report_text import table
from launch.sweep.trial import Trial

SEED = "seed"  # the flag over which results are averaged


def write_table(path: Path, trials: Sequence[Trial], metric: str, maximise: bool) -> None:
    """Writes every trial, the best first; means over seeds, where these were swept; and what failed, with its log."""
    flags = list(dict.fromkeys(flag for trial in trials for flag in trial.settings))

    def rank(trial: Trial) -> float:
        value = math.nan if trial.value is None else trial.value
        return math.inf if math.isnan(value) else -value if maximise else value

    rows = [
        [
            *(trial.settings.get(flag, "") for flag in flags),
            "" if trial.value is None else f"{trial.value:.6g}",
            trial.state,
            f"{trial.seconds:.0f}",
        ]
        for trial in sorted(trials, key=rank)
    ]
    blocks = [table("Trials, the best first", [*flags, metric, "state", "seconds"], rows)]
    others = [flag for flag in flags if flag != SEED]
    groups = by_settings(trials, others)
    if SEED in flags and others and groups:
        mean_rows = [
            [*key, len(values), f"{statistics.fmean(values):.6g}", spread(values)]
            for key, values in groups.items()
        ]
        header: list[str] = [*others, "seeds", f"mean {metric}", "standard deviation"]
        blocks.append(table("Over seeds", header, mean_rows))
    noted = [trial for trial in trials if trial.note]
    blocks += [f"{trial.name}, {trial.state}:\n\n```\n{trial.note}\n```" for trial in noted]
    text = "\n\n".join(blocks) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def by_settings(
    trials: Sequence[Trial], flags: Sequence[str]
) -> dict[tuple[str, ...], list[float]]:
    """Values of the trials that have one, by what they have for these flags."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for trial in trials:
        if trial.value is not None and math.isfinite(trial.value):
            key = tuple(trial.settings.get(flag, "") for flag in flags)
            groups.setdefault(key, []).append(trial.value)
    return groups


def spread(values: Sequence[float]) -> str:
    """Standard deviation of a sample, where it has one."""
    return f"{statistics.stdev(values):.3g}" if len(values) > 1 else ""


def draw(path: Path, trials: Sequence[Trial], metric: str) -> bool:
    """Draws the metric of every trial over each swept flag, with the mean at each value; False: there is nothing."""
    flags = list(dict.fromkeys(flag for trial in trials for flag in trial.settings))
    shown = [flag for flag in flags if flag != SEED] or flags
    if not by_settings(trials, flags):
        return False
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = new_figure(rows, columns, height=0.6 + 2.6 * rows)
    for axis, flag in zip(axes.flat, shown, strict=False):
        groups = {key[0]: values for key, values in by_settings(trials, [flag]).items()}
        numbers = as_numbers(list(groups))
        order = sorted(groups, key=numbers.__getitem__)
        for name in order:
            values = groups[name]
            axis.plot([numbers[name]] * len(values), values, "o", color=BLUE, ms=4, alpha=0.6)
        means = [statistics.fmean(groups[name]) for name in order]
        axis.plot([numbers[name] for name in order], means, color=ORANGE, lw=1.5)
        if any(numbers[name] != _number(name) for name in order):
            axis.set_xticks([numbers[name] for name in order], order)
        elif (low := min(numbers.values())) > 0 and max(numbers.values()) / low > 20:
            axis.set_xscale("log")
        axis.set_xlabel(flag, fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    figure.supylabel(metric, fontsize=9)
    figure.suptitle("Every trial, and the mean at each value")
    save_figure(figure, path)
    return True


def as_numbers(values: Sequence[str]) -> dict[str, float]:
    """Places on an axis: the values' own where all are finite numbers, otherwise 0, 1, 2."""
    numbers = {value: _number(value) for value in values}
    if all(math.isfinite(number) for number in numbers.values()):
        return numbers
    return {value: float(place) for place, value in enumerate(values)}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
