"""Scores of enhanced speech by closed forms and by their packages; the files they are of; the pictures."""

import json
import math

import numpy as np
import pytest
import soundfile
from PIL import Image

from edgespeech.data.batching import BatchConfig
from edgespeech.data.mixtures import MixtureConfig, MixtureSource
from edgespeech.data.noise import GeneratedNoise
from edgespeech.errors import InputError
from edgespeech.evaluation import enhancement
from edgespeech.evaluation.enhancement import (
    UtteranceScores,
    evaluate,
    level,
    score_utterance,
    summary,
)
from edgespeech.evaluation.enhancement_plots import (
    enhancement_curve,
    spectrogram_db,
    spectrograms,
)
from tests.support.tiny import ToneCorpus

RATE = 16_000


def sines(*amplitudes, seconds=0.25):
    """A sum of sines of whole periods: orthogonal, without mean."""
    time = np.arange(int(seconds * RATE)) / RATE
    waves = [a * np.sin(2 * np.pi * 400 * (i + 1) * time) for i, a in enumerate(amplitudes)]
    return np.sum(waves, axis=0)


def test_si_snr_of_orthogonal_sines():
    clean, noisy, estimate = sines(0.3), sines(0.3, 0.3), 0.2 * sines(0.3, 0.03)
    scores = score_utterance("a", noisy, clean, estimate)
    assert scores.id == "a"
    assert scores.si_snr == pytest.approx(20.0, abs=1e-4)
    assert scores.improvement == pytest.approx(20.0, abs=1e-3)
    worse = score_utterance("a", noisy, clean, sines(0.3, 0.6))
    assert worse.improvement == pytest.approx(-20 * math.log10(2), abs=1e-3)
    assert math.isnan(scores.stoi)  # a quarter of a second


def voice(seed=0, seconds=2.0):
    """Noise in bursts, as PESQ and STOI look for."""
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    return 0.2 * random.normal(size=len(time)) * (np.sin(2 * np.pi * 2 * time) > 0)


def test_pesq_and_stoi_of_the_clean_voice_and_of_a_noisier_one():
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    clean, noise = voice(), 0.1 * np.random.default_rng(1).normal(size=2 * RATE)
    best = score_utterance("a", clean + noise, clean, clean)
    assert best.pesq == pytest.approx(4.644, abs=0.001)  # the top of P.862.2's scale
    assert best.stoi == pytest.approx(1.0, abs=1e-6)
    noisier = score_utterance("a", clean + noise, clean, clean + noise)
    assert 1.0 < noisier.pesq < 4.0
    assert 0.2 < noisier.stoi < 0.99
    silent = score_utterance("a", clean, np.zeros(2 * RATE), clean)
    assert math.isnan(silent.pesq)


def test_without_the_packages(monkeypatch):
    monkeypatch.setattr(enhancement, "OPTIONAL", {"pesq": "no_pesq", "stoi": "no_stoi"})
    assert enhancement.missing_packages() == ["no_pesq", "no_stoi"]
    scores = score_utterance("a", voice(1), voice(), voice())
    assert math.isnan(scores.pesq)
    assert math.isnan(scores.stoi)


def test_level_is_the_least_squares_fit():
    noisy = np.random.default_rng(0).normal(size=200) * 0.1
    estimate = 7 * noisy + np.random.default_rng(1).normal(size=200)
    fit = np.linalg.lstsq(estimate[:, None], noisy, rcond=None)[0][0]
    np.testing.assert_allclose(level(noisy, estimate), fit * estimate, rtol=1e-9)
    loud = np.zeros(200)
    loud[3] = 1.0  # the fit would be 5
    np.testing.assert_allclose(level(5 * loud, loud), loud)
    np.testing.assert_array_equal(level(noisy, np.zeros(200)), 0.0)


@pytest.fixture
def source():
    corpus = ToneCorpus()
    batches = BatchConfig(batch_seconds=2.3, num_buckets=1)
    return MixtureSource(corpus, GeneratedNoise(corpus), MixtureConfig(), batches)


def half_clean(batch):
    """What a system would give that takes half of the noise away, ten times as loud."""
    return 10 * (batch.targets + 0.5 * (batch.audio[:, None] - batch.targets))


def test_scores_are_those_of_the_files(source, tmp_path):
    noisy = evaluate(tmp_path, "noisy", None, source)
    assert [row.improvement for row in noisy] == [0.0] * 6
    scores = evaluate(tmp_path, "half", half_clean, source)
    assert [row.id for row in scores] == [u.id for u in source.corpus.utterances]
    for index, row in enumerate(scores):
        read = {
            kind: soundfile.read(tmp_path / "audio" / kind / f"{index:04d}.wav")
            for kind in ("noisy", "clean", "half")
        }
        assert {rate for _, rate in read.values()} == {RATE}
        heard, clean, estimate = (read[kind][0] for kind in ("noisy", "clean", "half"))
        mixture = source.mix(source.corpus.audio(index), index, 0)
        np.testing.assert_allclose(heard, mixture.noisy, atol=1 / 65536 + 1e-7)
        np.testing.assert_allclose(clean, mixture.targets[0], atol=1 / 65536 + 1e-7)
        # Half the noise is 6 dB; its correlation with the voice makes it a little more or less.
        assert row.improvement == pytest.approx(20 * math.log10(2), abs=1.0)
        error = estimate - clean * (estimate @ clean) / (clean @ clean)
        ratio = np.sum((estimate - error) ** 2) / np.sum(error**2)
        assert row.si_snr == pytest.approx(10 * math.log10(ratio), abs=0.01)
        assert 0.5 < np.linalg.norm(estimate) / np.linalg.norm(heard) <= 1.0


def test_finished_scores_are_read_again(source, tmp_path):
    first = evaluate(tmp_path, "half", half_clean, source)

    def refuse(batch):
        raise AssertionError("enhanced again")

    again = evaluate(tmp_path, "half", refuse, source)
    assert json.dumps([row._asdict() for row in first]) == json.dumps(
        [row._asdict() for row in again]
    )


def test_summary_and_its_difference():
    teacher = [UtteranceScores(str(i), 10.0 + i, 5.0 + i, 2.0, math.nan) for i in range(4)]
    hybrid = [
        UtteranceScores(str(i), 9.0 + i, 4.0 + i, 1.0 + i if i < 2 else math.nan, math.nan)
        for i in range(4)
    ]
    means = summary(hybrid, teacher)
    assert means["si_snr"] == 10.5
    assert means["improvement"] == 5.5
    assert 4.0 <= means["ci"][0] < 5.5 < means["ci"][1] <= 7.0
    assert means["pesq"] == 1.5  # of those that have one
    assert math.isnan(means["stoi"])
    assert means["delta_vs_teacher"] == {"difference": -1.0, "ci": [-1.0, -1.0]}


# ------------------------------------------------------------------------------------- pictures


def test_spectrogram_of_a_sine():
    # 1 kHz is bin 32 of 257; a sine of amplitude a gives (a sum(window) / 2)^2 there.
    level_db = spectrogram_db(0.5 * np.sin(2 * np.pi * 1000 * np.arange(4000) / RATE))
    assert level_db.shape == ((4000 - 512) // 128 + 1, 257)
    assert set(level_db.argmax(1)) == {32}
    want = 20 * np.log10(0.5 * np.hanning(512).sum() / 2)
    np.testing.assert_allclose(level_db[:, 32], want, atol=0.01)


def test_pictures(tmp_path):
    scores = {"improvement": 6.0, "ci": [5.0, 7.0], "pesq": 2.0, "stoi": math.nan}
    hybrids = [{**scores, "replaced": 4}, {**scores, "replaced": 16, "pesq": math.nan}]
    controls = [{**scores, "replaced": 16, "name": "removed"}]
    zero = {**scores, "improvement": 0.0}
    enhancement_curve(tmp_path / "a.png", zero, scores, hybrids, controls, "tones")
    two = Image.open(tmp_path / "a.png").size
    for row in (scores, *hybrids, *controls):
        row["pesq"] = math.nan
    enhancement_curve(tmp_path / "b.png", zero, scores, hybrids, [], "tones")
    one = Image.open(tmp_path / "b.png").size
    assert (two[1] - one[1]) == pytest.approx(2.6 * 130, abs=2)  # a panel less
    spectrograms(tmp_path / "c.png", {"noisy": voice(), "clean": voice(1)}, "tones")
    assert Image.open(tmp_path / "c.png").size[0] == two[0]
    with pytest.raises(InputError, match="'short' has 511 samples"):
        spectrograms(tmp_path / "d.png", {"short": np.zeros(511)}, "tones")
    with pytest.raises(InputError, match="no signals"):
        spectrograms(tmp_path / "d.png", {}, "tones")
