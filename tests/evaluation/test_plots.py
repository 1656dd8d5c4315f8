"""Plots: the numbers that are drawn, the titles, and the size of the files."""

import numpy as np
import pytest
from PIL import Image

from edgespeech.errors import InputError
from edgespeech.evaluation import plots
from edgespeech.evaluation.drawing import at_most_columns

NOTE = "synthetic data"


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures that are saved."""
    figures = []
    save = plots.save_figure

    def collect(figure, path):
        save(figure, path)
        figures.append(figure)

    monkeypatch.setattr(plots, "save_figure", collect)
    return figures


def row(replaced, wer, **more):
    return {"replaced": replaced, "wer": wer, "ci": [0.9 * wer, 1.2 * wer], **more}


def check_file(path):
    assert path.stat().st_size < 120_000
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1040
        assert len(image.getcolors() or ()) > 5  # something is drawn


def test_sweep_bars(tmp_path, drawn):
    sweep = [
        {"layer": 2, "mse": 0.5, "relative_mse": 0.9},
        {"layer": 1, "mse": 0.01, "relative_mse": 0.3},
        {"layer": 3, "mse": 0.6, "relative_mse": np.nan},
    ]
    plots.sweep_bars(tmp_path / "plots" / "sweep.png", sweep, NOTE)
    (figure,) = drawn
    assert NOTE in figure.get_suptitle()
    raw, relative = figure.axes
    assert [bar.get_height() for bar in raw.patches] == [0.01, 0.5, 0.6]
    assert [label.get_text() for label in raw.get_xticklabels()] == ["1", "2", "3"]
    assert raw.get_yscale() == "log"  # a spread of 60
    assert [bar.get_height() for bar in relative.patches][:2] == [0.3, 0.9]
    assert relative.get_yscale() == "linear"
    assert relative.get_ylim()[0] == 0
    assert [text.get_text() for text in relative.texts] == ["0.3", "0.9", "", "n/a"]
    assert relative.texts[-1].get_position()[0] == 2
    check_file(tmp_path / "plots" / "sweep.png")


def test_wer_curve_of_further_splits(tmp_path, drawn):
    def both(replaced, wer):
        return row(replaced, wer, splits={"test-other": {"wer": 2 * wer, "ci": [wer, 3 * wer]}})

    hybrids = [both(2, 0.08), both(1, 0.05)]
    plots.wer_curve(tmp_path / "wer.png", both(0, 0.04), hybrids, [row(2, 0.2, name="x")], NOTE)
    (figure,) = drawn
    curve, points, other = figure.axes[0].containers
    np.testing.assert_allclose(curve.lines[0].get_xydata(), [[0, 4], [1, 5], [2, 8]])
    np.testing.assert_allclose(points.lines[0].get_xydata(), [[2.1, 20]])
    np.testing.assert_allclose(other.lines[0].get_xydata(), [[0, 8], [1, 10], [2, 16]])
    bars = [segment[:, 1] for segment in other.lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[4, 12], [5, 15], [8, 24]])
    assert other.get_label() == "hybrids, test-other"


def test_wer_curve(tmp_path, drawn):
    hybrids = [row(2, 0.08), row(1, 0.05)]
    controls = [row(2, 0.2, name="no pulses"), row(2, 0.0801, name="mean"), row(2, 0.08, name="x")]
    plots.wer_curve(tmp_path / "wer.png", row(0, 0.04), hybrids, controls, NOTE)
    (figure,) = drawn
    assert NOTE in figure.get_suptitle()
    (axis,) = figure.axes
    curve, points = axis.containers
    np.testing.assert_allclose(curve.lines[0].get_xydata(), [[0, 4], [1, 5], [2, 8]])
    bars = [segment[:, 1] for segment in curve.lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[3.6, 4.8], [4.5, 6.0], [7.2, 9.6]])
    np.testing.assert_allclose(points.lines[0].get_xydata(), [[2.1, 20], [2.2, 8.01], [2.3, 8]])
    assert {t.get_text(): tuple(np.round(t.xy, 3)) for t in axis.texts} == {
        "no pulses": (2.1, 20.0),
        "mean": (2.2, 8.01),
        "x": (2.3, 8.0),
    }
    heights = {t.get_text(): t.get_position()[1] for t in axis.texts}
    assert heights["no pulses"] > heights["mean"] >= heights["x"] + 0.069
    assert list(axis.get_xticks()) == [0, 1, 2]
    check_file(tmp_path / "wer.png")


def test_wer_curve_without_controls_or_errors(tmp_path, drawn):
    plots.wer_curve(tmp_path / "wer.png", row(0, 0.0), [row(1, 0.0)], [], "LibriSpeech test-clean")
    assert "LibriSpeech test-clean" in drawn[0].get_suptitle()
    assert drawn[0].axes[0].get_ylim()[0] == 0


@pytest.mark.parametrize("wers", [[1.0] * 9, [0.03] * 9, list(np.linspace(0.03, 1.2, 30))])
def test_control_labels_stay_apart_and_inside(tmp_path, drawn, wers):
    controls = [row(4, wer, name=f"control {i}") for i, wer in enumerate(wers)]
    plots.wer_curve(tmp_path / "wer.png", row(0, 0.03), [row(4, 0.1)], controls, NOTE)
    texts = drawn[0].axes[0].texts
    heights = np.sort([text.get_position()[1] for text in texts])
    assert np.diff(heights).min() > 0.99 * min(0.07, 1 / (len(wers) - 1))
    assert heights.min() > -1e-9
    assert heights.max() < 1 + 1e-9


def test_pulses_over_spectrogram(tmp_path, drawn):
    rng = np.random.default_rng(0)
    log_mel = rng.normal(size=(600, 80)).astype(np.float32)  # noise: the worst case for PNG
    aperiodic = np.zeros((3, 300))
    aperiodic[1, 100:150] = 1
    gates = {"aperiodic": aperiodic, "periodic": rng.uniform(size=(16, 300))}
    title = f"Layer 2, head 1, {NOTE}"
    words = [("SEVEN", 0.5, 1.5), ("TWO", 2.0, 3.0)]
    plots.pulses_over_spectrogram(tmp_path / "p.png", log_mel, gates, 0.02, title, words)
    top, first, second = drawn[0].axes
    assert top.get_title() == title
    assert top.images[0].get_extent() == [0, 6.0, 0, 80]
    assert first.images[0].get_extent() == [0, 6.0, 3.5, 0.5]  # pulse 1 on top
    np.testing.assert_array_equal(first.images[0].get_array(), aperiodic)
    assert (first.get_ylabel(), second.get_ylabel()) == ("aperiodic", "periodic")
    assert first.get_xlim() == (0, 6.0)
    assert [(t.get_text(), t.get_position()[0]) for t in top.texts] == [("SEVEN", 1), ("TWO", 2.5)]
    check_file(tmp_path / "p.png")

    # On the picture, the open pulse is coloured exactly from 2 s to 3 s.
    with Image.open(tmp_path / "p.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    y = pixels.shape[0] - first.transData.transform((0, 2))[1]
    blue = np.abs(pixels[round(y)] - [0, 114, 178]).sum(axis=1) < 12
    columns = first.transData.inverted().transform(np.column_stack([np.flatnonzero(blue)] * 2))
    assert columns[0, 0] == pytest.approx(2.0, abs=0.02)
    assert columns[-1, 0] == pytest.approx(3.0, abs=0.02)


def test_long_spectrogram_is_averaged():
    log_mel = np.random.default_rng(1).normal(size=(960, 3))
    pooled = at_most_columns(log_mel)
    np.testing.assert_allclose(pooled, (log_mel[0::2] + log_mel[1::2]) / 2)
    np.testing.assert_array_equal(at_most_columns(log_mel[:100]), log_mel[:100])
    assert at_most_columns(log_mel[:701]).shape == (480, 3)


def test_loss_curves(tmp_path, drawn):
    steps = np.arange(100) * 10
    curves = {
        "teacher": (steps, 300.0 / (1 + steps)),
        "layer 1": (steps, 2.0 + steps),
        "hybrid": ([0, 5, 10], [3.0, np.nan, np.nan]),
        "empty": ([], []),
    }
    plots.loss_curves(tmp_path / "loss.png", curves, NOTE)
    (figure,) = drawn
    assert NOTE in figure.get_suptitle()
    teacher, layer, hybrid, empty, *unused = figure.axes
    assert [axis.get_title() for axis in figure.axes[:4]] == list(curves)
    assert not any(axis.get_visible() for axis in unused)
    assert (teacher.get_yscale(), layer.get_yscale()) == ("log", "log")
    np.testing.assert_array_equal(layer.lines[0].get_ydata(), 2.0 + steps)
    # The running mean of a straight line, over 5 points, is the line itself without 2 at each end.
    x, y = layer.lines[1].get_data()
    np.testing.assert_array_equal(x, steps[2:-2])
    np.testing.assert_allclose(y, 2.0 + x)
    assert len(hybrid.lines) == 1
    assert hybrid.get_xlim()[1] > 10
    assert len(empty.lines[0].get_xdata()) == 0
    check_file(tmp_path / "loss.png")


def test_bad_input(tmp_path):
    path = tmp_path / "x.png"
    with pytest.raises(InputError, match=r"log_mel has shape \(1, 5, 4\)"):
        plots.pulses_over_spectrogram(path, np.zeros((1, 5, 4)), {"a": np.zeros((2, 3))}, 0.02, "t")
    with pytest.raises(InputError, match=r"periodic has shape \(3,\)"):
        plots.pulses_over_spectrogram(path, np.zeros((5, 4)), {"periodic": np.zeros(3)}, 0.02, "t")
    with pytest.raises(InputError, match="no gates"):
        plots.pulses_over_spectrogram(path, np.zeros((5, 4)), {}, 0.02, "t")
    with pytest.raises(InputError, match="no loss curves"):
        plots.loss_curves(path, {}, NOTE)
    with pytest.raises(InputError, match="'a' has 2 steps and 1 losses"):
        plots.loss_curves(path, {"a": ([1, 2], [1])}, NOTE)
    assert not path.exists()
