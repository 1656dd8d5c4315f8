"""Plots of an experiment on exits, in the style of `plots`: WER against layer, WER against compute."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgespeech.evaluation.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    choose_scale,
    new_figure,
    save_figure,
)

PURPLE, SKY = "#CC79A7", "#56B4E9"  # two more of Okabe and Ito's palette
_LINES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"))
_RULE_COLOURS = (BLUE, ORANGE, GREEN, SKY, PURPLE, RED)


def wer_against_layer(path: str | Path, models: Sequence[Mapping[str, Any]], note: str) -> None:
    """Draw the WER of every exit over the layer it follows, with 95 % intervals.

    models: those of the report: `name`, and `exits` with `layer`, `wer` and `ci`.
    """
    figure, axes = new_figure(1, 1, height=4.0)
    axis = axes[0, 0]
    values, ticks = [], set()
    for index, model in enumerate(models):
        layers = np.array([row["layer"] for row in model["exits"]], float)
        wer = 100 * np.array([row["wer"] for row in model["exits"]])
        low, high = 100 * np.array([row["ci"] for row in model["exits"]]).T
        colour, marker = _LINES[index % len(_LINES)]
        aside = 0.04 * (index - (len(models) - 1) / 2)  # intervals beside one another
        axis.errorbar(
            layers + aside, wer, [wer - low, high - wer], color=colour, marker=marker, ms=5,
            capsize=3, label=model["name"],
        )  # fmt: skip
        values.append(wer)
        ticks |= set(layers)
    choose_scale(axis, np.concatenate(values))
    axis.set(xlabel="layer of the exit", ylabel="WER, %", xticks=sorted(ticks))
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)
    figure.suptitle(f"Word error rate of every exit, {note}")
    save_figure(figure, path)


def wer_against_compute(path: str | Path, model: Mapping[str, Any], note: str) -> None:
    """Draw WER over multiply-accumulates per second of audio: every rule, the fixed exits, the oracle.

    model: one of the report: `name`, `exits`, `curves` and `oracle`, whose rows have `macs_per_second` and `wer`.
    """
    figure, axes = new_figure(1, 1, height=4.6)
    axis = axes[0, 0]

    def draw(rows: Sequence[Mapping[str, Any]], **style) -> None:
        # Budgets may give points out of order on the test split.
        points = sorted((row["macs_per_second"] / 1e6, 100 * row["wer"]) for row in rows)
        axis.plot(*np.array(points).T, **style)

    draw(model["exits"], color="black", marker="o", lw=1.5, label="fixed exit (budget)")
    for colour, (rule, rows) in zip(_RULE_COLOURS, model["curves"].items(), strict=True):
        label = rule.replace("_", " ")
        draw(rows, color=colour, marker=".", lw=1.2, alpha=0.9, label=label)
    draw(model["oracle"], color=GREY, ls="--", lw=1.5, label="oracle")
    choose_scale(axis, 100 * np.array([row["wer"] for row in [*model["exits"], *model["oracle"]]]))
    axis.set(xlabel="million multiply-accumulates per second of audio", ylabel="WER, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.suptitle(f"{model['name']}: word error rate over compute, {note}")
    save_figure(figure, path)
