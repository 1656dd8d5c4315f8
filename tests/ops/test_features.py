"""Log-mel features against a float64 DFT, and what SpecAugment may and may not touch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.errors import InputError
from edgespeech.ops.features import (
    SpecAugmentConfig,
    feature_lengths,
    log_mel,
    mel_filters,
    normalize_features,
    spec_augment,
    time_spans,
)
from tests.support import reference
from tests.support.contracts import padding_contract

log_mel_jit = jax.jit(log_mel, static_argnums=1)


def noise(t, seed=0):
    return np.random.default_rng(seed).normal(size=(2, t)) * 0.1


@pytest.mark.parametrize("num_mels", [20, 80])
def test_mel_filters(num_mels):
    got = mel_filters(num_mels)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, reference.mel_matrix(num_mels), atol=1e-6)


@pytest.mark.parametrize("num_mels", [20, 80])
def test_log_mel(num_mels):
    audio = noise(1234)
    got = log_mel_jit(np.float32(audio), num_mels)
    want = np.stack([reference.log_mel(row, num_mels) for row in audio])
    assert got.shape == want.shape == (2, 6, num_mels)
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_silence_is_at_the_floor():
    got = log_mel_jit(jnp.zeros((1, 400)), 20)
    np.testing.assert_allclose(got, np.full((1, 1, 20), np.log(1e-7)), rtol=1e-6)


def test_a_tone_is_loudest_in_the_filter_that_peaks_nearest():
    for m in (4, 10, 17):
        hz = reference.mel_matrix(20)[:, m].argmax() * 16_000 / 512
        audio = 0.5 * np.sin(2 * np.pi * hz * np.arange(800) / 16_000)
        got = np.asarray(log_mel_jit(np.float32(audio[None]), 20))
        assert (got[0].argmax(-1) == m).all()


@pytest.mark.parametrize("t", [0, 399, 400, 559, 560, 16_000])
def test_feature_lengths_count_the_frames(t):
    want = len(range(0, t - 399, 160))
    assert int(feature_lengths(jnp.array([t]))[0]) == want
    assert log_mel(jnp.zeros((1, t)), 20).shape[1] == want


def test_normalize_features():
    x = np.random.default_rng(1).normal(size=(2, 9, 4)) * [[[1]], [[20]]] + 5
    lengths = jnp.array([9, 6])
    got = padding_contract(jax.jit(normalize_features), np.float32(x), lengths)
    for row, length in enumerate((9, 6)):
        want = reference.normalize_over_time(x[row, :length])
        np.testing.assert_allclose(got[row, :length], want, atol=2e-5)
    np.testing.assert_array_equal(got[1, 6:], 0.0)


# ------------------------------------------------------------------------------- SpecAugment

CONFIG = SpecAugmentConfig(
    frequency_masks=2, frequency_width=3, time_mask_rate=0.03, time_width=9, max_time_masks=5
)
LENGTHS = np.array([200, 120, 40, 1])
augment = jax.jit(spec_augment, static_argnums=2)
spans_of = jax.jit(time_spans, static_argnums=(2, 3))


def runs_of(row):
    """Widths of the stretches of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
    return edges[1::2] - edges[::2]


def test_masked_features_are_zero_and_the_others_untouched():
    x = jax.random.normal(jax.random.key(0), (4, 200, 40)) + 10.0
    key = jax.random.key(1)
    out = np.asarray(augment(x, jnp.array(LENGTHS), CONFIG, key))
    is_masked = out == 0.0
    np.testing.assert_array_equal(out[~is_masked], np.asarray(x)[~is_masked])
    bins, frames = is_masked.all(1), is_masked.all(2)
    # Whole bands and whole frames, nothing else.
    np.testing.assert_array_equal(is_masked, bins[:, None, :] | frames[:, :, None])
    assert is_masked.any()
    np.testing.assert_array_equal(out, augment(x, jnp.array(LENGTHS), CONFIG, key))
    assert (out != augment(x, jnp.array(LENGTHS), CONFIG, jax.random.key(2))).any()


def test_widths_and_numbers_stay_within_their_limits():
    seen_bins, bands = np.zeros(40, bool), []
    x = jnp.ones((4, 200, 40))
    for seed in range(60):
        is_masked = np.asarray(augment(x, jnp.array(LENGTHS), CONFIG, jax.random.key(seed))) == 0
        bins, frames = is_masked.all(1), is_masked.all(2)
        for row, length in enumerate(LENGTHS):
            assert not frames[row, length:].any()
            widths = runs_of(frames[row])
            wanted = min(5, round(length * 0.03))
            assert len(widths) <= wanted
            assert widths.sum() <= wanted * min(9, int(length * 0.05) + 1)
            assert len(runs_of(bins[row])) <= 2
            assert bins[row].sum() <= 2 * 3
            bands.append(bins[row].sum())
        seen_bins |= bins.any(0)
    # Every bin is within reach, and the widest and the narrowest band.
    assert seen_bins.all()
    assert set(bands) == set(range(7))


def test_the_end_of_a_short_utterance_is_masked_as_often_as_its_start():
    # Widths are cut at 3 of 9 frames here; a start that left room for all 9 would spare the end.
    is_masked = np.asarray(spans_of(jax.random.key(4), jnp.full(4000, 40), 40, CONFIG))
    share = is_masked.mean(0)
    deviation = (share[0] / 4000) ** 0.5
    assert share[0] > 0.01
    assert abs(share[0] - share[-1]) < 5 * deviation
    assert abs(share[1] - share[-2]) < 5 * deviation


def test_masks_do_not_depend_on_the_padding():
    lengths, key = jnp.array(LENGTHS), jax.random.key(3)
    short, long = (np.asarray(spans_of(key, lengths, n, CONFIG)) for n in (200, 260))
    np.testing.assert_array_equal(short, long[:, :200])
    assert not long[:, 200:].any()
    assert short[0].any()


def test_no_masks_leave_features_as_they_are():
    x = jax.random.normal(jax.random.key(0), (2, 50, 8))
    config = SpecAugmentConfig(frequency_masks=0, max_time_masks=0)
    np.testing.assert_array_equal(augment(x, jnp.array([50, 9]), config, jax.random.key(0)), x)


@pytest.mark.parametrize("name", ["frequency_masks", "frequency_width", "time_mask_rate"])
def test_config_names_what_is_wrong(name):
    with pytest.raises(InputError, match=f"{name} is -1: it must be at least 0"):
        SpecAugmentConfig(**{name: -1})
