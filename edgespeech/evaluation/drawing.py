"""What all plots share: colours, size, scales, labels, and how a figure becomes a PNG.

The colours are the palette of Okabe and Ito, which colour-blind readers can tell apart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
_DPI = 130
SHADES = 40  # of a spectrogram: few enough for a palette PNG to keep them all
MOST_COLUMNS = 480  # of a spectrogram: finer ones are lost at this width and double the file
_LOG_RANGE = 15  # values that spread wider than this are unreadable on a linear axis


def new_figure(rows: int, columns: int, height: float, **layout) -> tuple[Figure, np.ndarray]:
    """A figure of the page's width with its axes `[rows columns]`."""
    # Outside pyplot: no global state, no window, nothing to close.
    figure = Figure(figsize=(8, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **layout)
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure as a small PNG."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    # A palette of 256 colours halves the file.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def at_most_columns(log_mel: np.ndarray) -> np.ndarray:
    """Average neighbouring feature frames, [f m] -> at most [MOST_COLUMNS m]."""
    edges = np.linspace(0, len(log_mel), min(len(log_mel), MOST_COLUMNS) + 1).astype(int)
    return np.add.reduceat(log_mel, edges[:-1], axis=0) / np.diff(edges)[:, None]


def choose_scale(axis: Axes, values: np.ndarray) -> None:
    """Choose a linear axis from 0, or a logarithmic one for positive values that spread widely."""
    finite = values[np.isfinite(values)]
    spread = finite.max() / finite.min() if len(finite) and finite.min() > 0 else 1
    if spread > _LOG_RANGE:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if spread < 1000 else (1,)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif len(finite) and finite.min() >= 0:
        axis.set_ylim(bottom=0)


def wer_intervals(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of replaced layers, WER in percent, and the two lengths of each error bar."""
    wer = 100 * np.array([row["wer"] for row in rows], float)
    low, high = 100 * np.array([row["ci"] for row in rows], float).T
    return (
        np.array([row["replaced"] for row in rows], float),
        wer,
        np.array([wer - low, high - wer]),
    )


def shift_aside(x: np.ndarray) -> np.ndarray:
    """Shift points of equal x to the right of it, side by side."""
    rank = np.array([np.sum(x[:i] == x[i]) for i in range(len(x))])
    return 0.1 * (rank + 1)


def label_at_right(axis: Axes, names: Sequence[str], x: np.ndarray, y: np.ndarray) -> None:
    """Write names in a column beside the axes, pushed apart, each with a line to its point."""
    axis.autoscale_view()
    to_fraction = axis.transData + axis.transAxes.inverted()
    wanted = to_fraction.transform(np.column_stack([x, y]))[:, 1]
    order = np.argsort(wanted)
    gap = min(0.07, 1 / max(1, len(names) - 1))
    # Packed upwards from each wanted height, then back down from the top where that overflows.
    heights = np.clip(wanted[order], 0, 1)
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    heights[-1] = min(heights[-1], 1)
    for i in range(len(heights) - 2, -1, -1):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    for i, height in zip(order, heights, strict=True):
        axis.annotate(
            str(names[i]),
            (x[i], y[i]),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6, "shrinkB": 4},
        )
