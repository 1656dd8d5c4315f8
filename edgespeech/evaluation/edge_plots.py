"""Pictures of an experiment on the edge Conformer."""

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

_COLOURS = (BLUE, ORANGE, GREEN, RED)


def wer_against_chunk(path: str | Path, rows: Sequence[Mapping[str, Any]], note: str) -> None:
    """Draw the WER over the chunk's duration, a line for each left context, with 95 % intervals.

    rows: those of the report's matrix.
    """
    figure, axes = new_figure(1, 1, height=4.0)
    axis = axes[0, 0]
    limited = [row for row in rows if row["size"] is not None]
    for index, left in enumerate(sorted({row["left"] for row in limited})):
        line = sorted((row for row in limited if row["left"] == left), key=lambda row: row["size"])
        wer = 100 * np.array([row["wer"] for row in line])
        low, high = 100 * np.array([row["ci"] for row in line]).T
        axis.errorbar(
            [40 * row["size"] * 1.01**index for row in line], wer, [wer - low, high - wer],
            color=_COLOURS[index % len(_COLOURS)], marker="o", ms=5, capsize=3, label=f"chunks of left context: {left}",
        )  # fmt: skip
    for row in rows:
        if row["size"] is None:
            axis.axhline(100 * row["wer"], color=GREY, ls="--", label="full context")
    milliseconds = sorted({40 * row["size"] for row in limited})
    axis.set_xscale("log", base=2)
    axis.set_xticks(milliseconds, map(str, milliseconds))
    choose_scale(axis, 100 * np.array([row["wer"] for row in rows]))
    axis.set(xlabel="chunk, ms", ylabel="WER, %")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)
    figure.suptitle(f"Word error rate of one model by chunk, {note}")
    save_figure(figure, path)
