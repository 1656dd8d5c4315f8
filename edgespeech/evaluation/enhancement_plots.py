"""Plots of an enhancement experiment, in the manner of `plots`: `note` says the kind of data and goes into titles."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps

from edgespeech.errors import InputError
from edgespeech.evaluation.drawing import (
    BLUE,
    GREY,
    RED,
    SHADES,
    at_most_columns,
    label_at_right,
    new_figure,
    save_figure,
    shift_aside,
)
from edgespeech.types import SAMPLE_RATE

_WINDOW, _HOP = 512, 128  # samples: 32 ms and 8 ms
_RANGE_DB = 70  # below the loudest value all is black
_PANELS = (("improvement", "SI-SNR improvement, dB"), ("pesq", "PESQ"), ("stoi", "STOI"))


def enhancement_curve(
    path: str | Path,
    noisy: Mapping[str, Any],
    teacher: Mapping[str, Any],
    hybrids: Sequence[Mapping[str, Any]],
    controls: Sequence[Mapping[str, Any]],
    note: str,
) -> None:
    """Draw every score over the number of replaced layers; those that nobody has are left out.

    noisy, teacher, hybrids, controls: rows of the report, see `enhancement_report`.
    """
    curve = [{**teacher, "replaced": 0}, *sorted(hybrids, key=lambda row: row["replaced"])]
    panels = [panel for panel in _PANELS if np.isfinite([row[panel[0]] for row in curve]).any()]
    figure, axes = new_figure(len(panels), 1, height=0.8 + 2.6 * len(panels), sharex=True)
    most = max(row["replaced"] for row in [*curve, *controls])
    for axis, (key, label) in zip(axes[:, 0], panels, strict=True):
        x = np.asarray([row["replaced"] for row in curve], float)
        y = np.asarray([row[key] for row in curve], float)
        bars = _bars(curve, y) if key == "improvement" else None
        axis.errorbar(x, y, bars, color=BLUE, marker="o", capsize=3, label="hybrids", zorder=3)
        axis.axhline(teacher[key], color=GREY, ls="--", lw=1, label="teacher")
        axis.axhline(noisy[key], color=GREY, ls=":", lw=1, label="noisy")
        if controls:
            x = np.asarray([row["replaced"] for row in controls], float)
            x = x + shift_aside(x) * most / 8
            y = np.asarray([row[key] for row in controls], float)
            bars = _bars(controls, y) if key == "improvement" else None
            axis.errorbar(
                x, y, bars, color=RED, ls="", marker="D", ms=5, capsize=3, label="controls"
            )
            shown = np.isfinite(y)
            if shown.any():
                names = [row["name"] for row, show in zip(controls, shown, strict=True) if show]
                label_at_right(axis, names, x[shown], y[shown])
        axis.set(ylabel=label, xticks=[row["replaced"] for row in curve])
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].legend(loc="best", fontsize=8)
    axes[-1, 0].set(xlabel="intra-chunk layers replaced")
    figure.suptitle(f"Enhancement over replaced layers, {note}")
    save_figure(figure, path)


def _bars(rows: Sequence[Mapping[str, Any]], means: np.ndarray) -> np.ndarray:
    low, high = np.asarray([row["ci"] for row in rows], float).T
    return np.asarray([means - low, high - means])


def spectrograms(path: str | Path, signals: Mapping[str, np.ndarray], note: str) -> None:
    """Draw the spectrograms of signals of one utterance below each other, on one scale.

    signals: float `[t]` at 16 kHz by their names.

    Raises:
        InputError: there are no signals, or one is shorter than a window of 32 ms.
    """
    if not signals:
        raise InputError("no signals to draw: give at least one")
    for name, signal in signals.items():
        if len(signal) < _WINDOW:
            raise InputError(f"{name!r} has {len(signal)} samples: give {_WINDOW} or more")
    levels = {name: spectrogram_db(signal) for name, signal in signals.items()}
    top = max(level.max() for level in levels.values())
    figure, axes = new_figure(len(levels), 1, height=0.5 + 1.6 * len(levels), sharex=True)
    for axis, (name, level) in zip(axes[:, 0], levels.items(), strict=True):
        axis.imshow(
            at_most_columns(level).T,
            aspect="auto",
            interpolation="nearest",
            origin="lower",
            extent=(0, len(level) * _HOP / SAMPLE_RATE, 0, SAMPLE_RATE / 2000),
            cmap=colormaps["magma"].resampled(SHADES),
            vmin=top - _RANGE_DB,
            vmax=top,
        )
        axis.set_title(name, fontsize=9)
        axis.set_ylabel("kHz", fontsize=8)
    axes[-1, 0].set_xlabel("time, s", fontsize=9)
    figure.suptitle(f"One test utterance, {note}")
    save_figure(figure, path)


def spectrogram_db(signal: np.ndarray) -> np.ndarray:
    """Power in dB of windowed frames, `[t] -> [frames 257]`: Hann windows of 32 ms every 8 ms."""
    frames = np.lib.stride_tricks.sliding_window_view(signal, _WINDOW)[::_HOP]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(_WINDOW))))
    return 10 * np.log10(power + 1e-10)
