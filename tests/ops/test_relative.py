"""Averages over windows around every frame: the prefix-sum form against float64 weights of every pair of frames."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.errors import InputError
from edgespeech.ops.relative import relative_average, relative_average_reference, window_spans
from tests.support.gradients import assert_gradient

fast = jax.jit(relative_average, static_argnums=(4, 5))


def inputs(n, lengths, taps, octaves, h=2, c=3, spread=2.0, seed=0):
    rng = np.random.default_rng(seed)
    k = len(window_spans(taps, octaves))
    values = rng.normal(size=(len(lengths), n, h, c)) + 1.0
    scores = spread * rng.normal(size=(len(lengths), n, h, k))
    salience = 0.5 * spread * rng.uniform(-1, 1, (len(lengths), n, h))
    return values, scores, salience, np.arange(n) < np.array(lengths)[:, None]


def test_windows_by_hand():
    assert window_spans(1, 2)[:, 0].tolist() == [-1, 0, 1, 2, 4, 8, -3, -7, -(1 << 30)]
    assert window_spans(1, 2)[:, 1].tolist() == [-1, 0, 1, 3, 7, 1 << 30, -2, -4, -8]
    assert window_spans(0, 0).tolist() == [[0, 0], [1, 1 << 30], [-(1 << 30), -1]]


@pytest.mark.parametrize(("taps", "octaves"), [(0, 0), (1, 2), (3, 4), (5, 1)])
def test_every_distance_is_in_one_window(taps, octaves):
    first, last = window_spans(taps, octaves).T[..., None]
    distances = np.arange(-200, 201)
    inside = (first <= distances) & (distances <= last)
    assert (inside.sum(axis=0) == 1).all()


@pytest.mark.parametrize(("taps", "octaves"), [(0, 0), (1, 2), (3, 4)])
@pytest.mark.parametrize(("n", "lengths"), [(1, [1]), (2, [2, 1]), (9, [9, 4]), (150, [150, 101])])
def test_equals_the_reference(n, lengths, taps, octaves):
    values, scores, salience, mask = inputs(n, lengths, taps, octaves)
    want = relative_average_reference(values, scores, salience, mask, taps, octaves)
    found = fast(np.float32(values), np.float32(scores), np.float32(salience), mask, taps, octaves)
    np.testing.assert_allclose(np.asarray(found)[mask], want[mask], atol=2e-6)


def test_by_hand():
    """Frame 1 of three, one tap, no octave: itself e^a, before it e^b, after it e^c."""
    scores = np.log([[1.0, 2.0, 3.0, 5.0, 7.0]])  # -1, 0, 1, beyond 1, before -1
    scores = np.broadcast_to(scores, (1, 3, 1, 5))
    values = np.array([1.0, 10.0, 100.0]).reshape(1, 3, 1, 1)
    found = fast(
        np.float32(values), np.float32(scores), np.zeros((1, 3, 1)), np.ones((1, 3), bool), 1, 0
    )[0, :, 0, 0]
    want = [(2 * 1 + 3 * 10 + 5 * 100) / 10, (1 + 20 + 300) / 6, (7 * 1 + 1 * 10 + 2 * 100) / 10]
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_equal_scores_give_the_mean_of_all_frames():
    values, scores, salience, mask = inputs(40, [40, 23], 3, 2)
    found = fast(np.float32(values), np.float32(0 * scores + 4), 0 * salience + 2, mask, 3, 2)
    for row, length in enumerate([40, 23]):
        mean = values[row, :length].mean(axis=0)
        np.testing.assert_allclose(
            found[row, :length], np.broadcast_to(mean, (length, 2, 3)), atol=3e-6
        )


def test_large_scores_stay_finite():
    """A window that holds no frame may have the largest score of all."""
    values, scores, salience, mask = inputs(12, [12, 3], 1, 3)
    scores = 300 * scores
    want = relative_average_reference(values, scores, salience, mask, 1, 3)
    found = fast(np.float32(values), np.float32(scores), np.float32(salience), mask, 1, 3)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.asarray(found)[mask], want[mask], atol=2e-5)


@pytest.mark.parametrize(("n", "lengths"), [(9, [9, 4]), (40, [40, 31])])
def test_gradient(n, lengths):
    values, scores, salience, mask = inputs(n, lengths, 2, 2)
    outside = ~mask[..., None, None]

    def valid(average):
        return lambda v, s, r: average(v, s, r, mask, 2, 2) * ~outside

    assert_gradient(valid(fast), valid(relative_average_reference), [values, scores, salience])


def test_padding_is_not_seen():
    values, scores, salience, mask = inputs(9, [9, 4], 1, 2)
    values, scores, salience = np.float32(values), np.float32(scores), np.float32(salience)
    want = fast(values, scores, salience, mask, 1, 2)

    def dirty(a):
        return np.where(mask.reshape(2, 9, *(1,) * (a.ndim - 2)), a, np.float32(np.nan))

    found = fast(dirty(values), dirty(scores), dirty(salience), mask, 1, 2)
    np.testing.assert_array_equal(np.asarray(found)[mask], np.asarray(want)[mask])
    alone = fast(values[1:, :4], scores[1:, :4], salience[1:, :4], mask[1:, :4], 1, 2)
    np.testing.assert_allclose(alone[0], want[1, :4], atol=1e-6)


def test_half_precision_sums_in_float32():
    values, scores, salience, mask = inputs(3000, [3000], 3, 4, h=1, c=1)
    half = jnp.asarray(values, jnp.float16)
    found = fast(half, np.float32(scores), np.float32(salience), mask, 3, 4)
    assert found.dtype == jnp.float32
    want = fast(np.float32(half), np.float32(scores), np.float32(salience), mask, 3, 4)
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_negative_numbers():
    with pytest.raises(InputError, match="-1 taps and 2 octaves"):
        window_spans(-1, 2)
