"""Streaming log-mel features against loops, and their contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.errors import InputError
from edgespeech.nn.streaming_features import RunningNorm, StreamingLogMel, decayed_sums
from tests.support import reference
from tests.support.streaming import verify_streaming_contract

MELS = 7
RNG = np.random.default_rng


def audio(batch, t, seed=3):
    return (0.1 * RNG(seed).normal(size=(batch, t))).astype(np.float32)


def running_norm(x):
    """`[f m]`: deviations from -6, 100 frames of mean 0 and variance 16 before them, a factor 299/300 a frame."""
    S, Q, W = np.zeros(x.shape[1]), np.full(x.shape[1], 1600.0), 100.0
    y = np.zeros_like(x)
    for i, frame in enumerate(x + 6.0):
        S, Q, W = (a * 299 / 300 + b for a, b in ((S, frame), (Q, frame**2), (W, 1.0)))
        variance = np.maximum(Q / W - (S / W) ** 2, 1.0)
        y[i] = (frame - S / W) / np.sqrt(variance)
    return y


def test_decayed_sums():
    x, initial = RNG(0).normal(size=(2, 9, 3)), RNG(1).normal(size=(2, 3))
    got = jax.jit(decayed_sums, static_argnums=1)(np.float32(x), 0.7, np.float32(initial))
    s = initial
    for i in range(9):
        s = 0.7 * s + x[:, i]
        np.testing.assert_allclose(got[:, i], s, rtol=1e-5, atol=1e-6)


def test_features_match_the_equations():
    x = audio(2, 2000)
    x[0, 900:] *= 20.0  # a change of level
    lengths = np.array([2000, 700])
    got, frames = jax.jit(StreamingLogMel(MELS).__call__)(x, lengths)
    np.testing.assert_array_equal(frames, [12, 4])
    for row, (t, f) in enumerate(zip(lengths, frames, strict=True)):
        padded = np.concatenate([np.zeros(240), np.float64(x[row, :t])])
        want = running_norm(reference.log_mel(padded, MELS))
        np.testing.assert_allclose(got[row, :f], want, atol=2e-4)
        np.testing.assert_array_equal(got[row, f:], 0.0)


def test_contract_of_the_norm():
    def features(batch, n):
        return RNG(5).normal(-6.0, 3.0, size=(batch, n, MELS))

    verify_streaming_contract(RunningNorm(MELS), features, length=40)


def test_contract_of_the_front_end():
    # A power spectrum's logarithm: float32 has fewer digits of it than of a plain sum.
    verify_streaming_contract(StreamingLogMel(MELS), audio, length=160 * 8 + 57, atol=5e-5)


def test_the_sums_of_hours_stay_bounded():
    """Constant frames: the mean is forgotten, and the sums go where a geometric series goes."""
    norm = RunningNorm(MELS)
    x = jnp.full((1, 20_000, MELS), 2.0)
    y, _, state = jax.jit(norm.step)(x, jnp.array([20_000]), norm.init_state(1))
    np.testing.assert_allclose(y[0, -1], 0.0, atol=1e-4)
    np.testing.assert_allclose(state[0], [8 * 300] * MELS + [64 * 300] * MELS + [300], rtol=1e-3)


def test_silence_is_finite_and_speech_after_it_is_bounded():
    x = np.concatenate([np.zeros((1, 160 * 600)), audio(1, 160 * 5)], axis=1)
    y, _ = jax.jit(StreamingLogMel(MELS).__call__)(np.float32(x), np.array([x.shape[1]]))
    assert np.isfinite(y).all()
    # From log 1e-7 to log-mel values of this noise, about 0, at most in units of 1.
    assert 5.0 < np.abs(y[0, 600:]).max() < 20.0


def test_bad_input():
    module = StreamingLogMel(MELS)
    with pytest.raises(InputError, match="array of 100 frames: pad it to a multiple of 160"):
        module.step(jnp.zeros((1, 100)), jnp.array([100]), module.init_state(1))
