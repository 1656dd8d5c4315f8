"""Plots of a conversion experiment, as PNG files sized for the width of a README page.

`note` says the kind of data, such as "synthetic data", and goes into the title. Layers are numbered from 1.
"""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from edgespeech.errors import InputError
from edgespeech.evaluation.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SHADES,
    at_most_columns,
    choose_scale,
    label_at_right,
    new_figure,
    save_figure,
    shift_aside,
    wer_intervals,
)

FEATURE_SECONDS = 0.01  # one feature frame, see edgespeech/types.py
_GATE_SHADES = 12  # few enough for a palette PNG to keep them all


def sweep_bars(path: str | Path, sweep: Sequence[Mapping[str, Any]], note: str) -> None:
    """Draw the MSE of each layer replaced on its own, raw and over the variance of its target.

    sweep: rows with `layer` (from 1), `mse` and `relative_mse`, as in the report.
    """
    rows = sorted(sweep, key=lambda row: row["layer"])
    layers = [str(row["layer"]) for row in rows]
    figure, axes = new_figure(1, 2, height=3.4)
    panels = (("mse", "MSE", BLUE), ("relative_mse", "MSE / variance", ORANGE))
    for axis, (key, label, colour) in zip(axes.flat, panels, strict=True):
        values = np.array([row[key] for row in rows], float)
        bars = axis.bar(layers, values, color=colour, width=0.7)
        texts = [f"{value:.2g}" if np.isfinite(value) else "" for value in values]
        axis.bar_label(bars, texts, padding=2, fontsize=7, rotation=90 if len(rows) > 8 else 0)
        for index in np.flatnonzero(~np.isfinite(values)):
            axis.text(index, 0.02, "n/a", ha="center", transform=axis.get_xaxis_transform())
        axis.margins(y=0.18)
        choose_scale(axis, values)
        axis.set(xlabel="replaced layer", title=label)
    figure.suptitle(f"How hard each layer is to replace, {note}")
    save_figure(figure, path)


def wer_curve(
    path: str | Path,
    teacher: Mapping[str, Any],
    hybrids: Sequence[Mapping[str, Any]],
    controls: Sequence[Mapping[str, Any]],
    note: str,
) -> None:
    """Draw WER in percent over the number of replaced layers, with 95 % intervals.

    teacher, hybrids, controls: rows of the report: `wer` and `ci` as fractions, `replaced`, and
    `name` for controls. Test splits after the first get a curve of their own, without controls.
    """
    figure, axes = new_figure(1, 1, height=4.0)
    axis = axes[0, 0]
    curve = [{**teacher, "replaced": 0}, *sorted(hybrids, key=lambda row: row["replaced"])]
    x, wer, bars = wer_intervals(curve)
    axis.errorbar(x, wer, bars, color=BLUE, marker="o", capsize=3, label="hybrids", zorder=3)
    axis.axhspan(*(100 * bound for bound in teacher["ci"]), color=GREY, alpha=0.2, lw=0)
    axis.axhline(100 * teacher["wer"], color=GREY, ls="--", lw=1, label="teacher, 95 % CI")
    if controls:
        x_controls, wer_controls, bars = wer_intervals(controls)
        x_controls = x_controls + shift_aside(x_controls)
        axis.errorbar(
            x_controls, wer_controls, bars, color=RED, ls="", marker="D", ms=5, capsize=3,
            label="controls",
        )  # fmt: skip
        wer = np.concatenate([wer, wer_controls])
    for colour, split in zip(itertools.cycle((GREEN, ORANGE)), teacher.get("splits", {})):
        rows = [{**row["splits"][split], "replaced": row["replaced"]} for row in curve]
        x, further, bars = wer_intervals(rows)
        axis.errorbar(
            x, further, bars, color=colour, marker="s", ms=4, capsize=3, label=f"hybrids, {split}"
        )
        wer = np.concatenate([wer, further])
    choose_scale(axis, wer)
    if controls:
        label_at_right(axis, [row["name"] for row in controls], x_controls, wer_controls)
    most = max(row["replaced"] for row in [*curve, *controls])
    axis.set(xlabel="layers replaced", ylabel="WER, %", xticks=range(most + 1))
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="best", fontsize=8)
    figure.suptitle(f"Word error rate over replaced layers, {note}")
    save_figure(figure, path)


def pulses_over_spectrogram(
    path: str | Path,
    log_mel: np.ndarray,
    gates: Mapping[str, np.ndarray],
    frame_seconds: float,
    title: str,
    words: Sequence[tuple[str, float, float]] = (),
) -> None:
    """Draw where the pulses of one layer are open, below the spectrogram of the utterance.

    log_mel: [f m], feature frames of 10 ms. gates: for each kind of pulse [p n] in [0, 1], encoder
    frames of `frame_seconds`. words: (word, start, end) in seconds. The caller's title says the
    layer and the kind of data.

    Raises:
        InputError: `log_mel` or a gate array is not two-dimensional, or there are no gates.
    """
    shapes = {"log_mel": np.shape(log_mel), **{kind: np.shape(g) for kind, g in gates.items()}}
    for name, shape in shapes.items():
        if len(shape) != 2:
            raise InputError(f"{name} has shape {shape}: give two dimensions")
    if not gates:
        raise InputError("no gates to draw: give at least one kind of pulse")
    heights = [3.0, *(0.5 + 0.12 * min(len(g), 16) for g in gates.values())]
    figure, axes = new_figure(len(heights), 1, sum(heights), sharex=True, height_ratios=heights)
    top, *panels = axes[:, 0]
    frames, bins = log_mel.shape
    seconds = frames * FEATURE_SECONDS
    low, high = np.percentile(log_mel, [2, 99.8])
    top.imshow(
        at_most_columns(log_mel).T,
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        extent=(0, seconds, 0, bins),
        cmap=colormaps["magma"].resampled(SHADES),
        vmin=low,
        vmax=high,
    )
    top.set(ylabel="mel bin")
    top.set_title("\n".join(textwrap.wrap(title, 80)), fontsize=11)
    for word, start, end in words:
        top.axvline(start, color="white", lw=0.7, alpha=0.7)
        top.axvline(end, color="white", lw=0.7, alpha=0.7)
        top.text(
            (start + end) / 2, bins * 0.97, word, color="white", ha="center", va="top", fontsize=8
        )
    colours = (BLUE, RED, GREEN, ORANGE)
    for index, (axis, (kind, gate)) in enumerate(zip(panels, gates.items(), strict=True)):
        count, length = gate.shape
        axis.imshow(
            gate,
            aspect="auto",
            interpolation="nearest",
            extent=(0, length * frame_seconds, count + 0.5, 0.5),
            cmap=LinearSegmentedColormap.from_list(
                kind, ["white", colours[index % 4]], N=_GATE_SHADES
            ),
            vmin=0,
            vmax=1,
        )
        axis.hlines(np.arange(1, count) + 0.5, 0, seconds, color="0.85", lw=0.5)
        axis.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
        axis.set_ylabel(kind)
    panels[-1].set(xlabel="time, s", xlim=(0, seconds))
    figure.align_ylabels()
    save_figure(figure, path)


def loss_curves(
    path: str | Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], note: str
) -> None:
    """Draw the training loss of every stage in a panel of its own, with a running mean.

    curves: for each stage its steps and its losses; losses that are not finite leave gaps.

    Raises:
        InputError: there is no stage, or one has another number of steps than of losses.
    """
    if not curves:
        raise InputError("no loss curves to draw: give at least one stage")
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = new_figure(rows, columns, height=0.6 + 2.1 * rows)
    for axis, (stage, (steps, losses)) in zip(axes.flat, curves.items(), strict=False):
        if len(steps) != len(losses):
            raise InputError(f"stage {stage!r} has {len(steps)} steps and {len(losses)} losses")
        losses = np.asarray(losses, float)
        window = len(losses) // 25 | 1  # odd: the mean belongs to the step in its middle
        smooth = window > 1
        axis.plot(steps, losses, color=BLUE, lw=1, alpha=0.35 if smooth else 1)
        if smooth:
            mean = np.convolve(losses, np.full(window, 1 / window), "valid")
            axis.plot(steps[window // 2 : -(window // 2)], mean, color=BLUE, lw=1.5)
        # Over all steps, so that a stage whose loss stopped being finite shows where.
        axis.update_datalim(np.column_stack([steps, np.zeros(len(steps))]), updatey=False)
        choose_scale(axis, losses)
        axis.set_title(stage, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("loss", fontsize=9)
    figure.suptitle(f"Training loss, {note}")
    save_figure(figure, path)
