"""SI-SNR against float64 and closed forms, permutations, the threshold of the loss, padding and silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.ops.sisnr import (
    permutation_invariant_si_snr,
    si_snr,
    si_snr_loss,
    si_snr_reference,
)
from tests.support.contracts import padding_contract
from tests.support.gradients import numeric_derivative

T = 60
score = jax.jit(si_snr)
pit = jax.jit(permutation_invariant_si_snr)
loss_of = jax.jit(si_snr_loss)
loss_and_gradient = jax.jit(jax.value_and_grad(si_snr_loss))


def signals(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def orthogonal(seed=0):
    """Two signals without mean, of energy 10^4, at right angles."""
    x = signals(T, 2, seed=seed)
    return 100.0 * np.linalg.qr(x - x.mean(0))[0].T


@pytest.mark.parametrize("db", [-20.0, 0.0, 10.0, 30.0])
def test_noise_at_right_angles_has_the_ratio_it_was_given(db):
    clean, noise = orthogonal()
    estimate = 5.0 * (clean + noise * 10 ** (-db / 20)) + 3.0  # level and offset do not count
    want = 10 * np.log10(10 ** (db / 10) + 1e-8)
    assert si_snr_reference(estimate, clean) == pytest.approx(want, abs=1e-8)
    assert si_snr_reference(-0.1 * estimate, 7.0 * clean - 1.0) == pytest.approx(want, abs=1e-7)
    got = score(np.float32(estimate[None]), np.float32(clean[None]), jnp.array([T]))
    np.testing.assert_allclose(got, [db], atol=2e-4)


def test_against_the_reference_and_padding():
    x, lengths = signals(3, T, 2), (T, 41, 2)
    out = padding_contract(
        lambda x, n: score(x[..., 0], x[..., 1], n)[:, None],
        np.float32(x),
        lengths,
        rows=(0, 1),
        out_length=lambda n: 1,
        atol=1e-4,
    )
    for row in (0, 1):
        want = si_snr_reference(x[row, : lengths[row], 0], x[row, : lengths[row], 1])
        np.testing.assert_allclose(out[row, 0], want, atol=5e-4)
    # Two samples without their mean are always proportional: the noise is rounding alone.
    assert out[2, 0] > 60


def test_gradient_against_finite_differences_of_the_reference():
    x, n = signals(2, T, 2, seed=3), np.array([T, 37])
    target, direction = np.float32(x[..., 1]), signals(2, T, seed=4)
    gradient = jax.jit(jax.grad(lambda e: jnp.sum(si_snr(e, target, n))))(np.float32(x[..., 0]))
    np.testing.assert_array_equal(np.asarray(gradient)[1, 37:], 0.0)

    def slow(estimate):
        return sum(
            si_snr_reference(e[:k], t[:k]) for e, t, k in zip(estimate, target, n, strict=True)
        )

    want = numeric_derivative(slow, [x[..., 0]], [direction])
    assert np.sum(np.float64(gradient) * direction) == pytest.approx(want, abs=2e-3)


@pytest.mark.parametrize("silent", ["estimate", "target", "both", "no samples"])
def test_silence_scores_minus_80_with_a_finite_gradient(silent):
    estimate, target = (np.float32(signals(1, T, seed=s)) for s in (0, 1))
    if silent in ("estimate", "both"):
        estimate = 0 * estimate + 0.5
    if silent in ("target", "both"):
        target = 0 * target
    n = jnp.array([0 if silent == "no samples" else T])
    value, gradient = jax.jit(jax.value_and_grad(lambda e: jnp.sum(si_snr(e, target, n))))(estimate)
    assert value == pytest.approx(-80.0, abs=1e-3)
    assert np.isfinite(gradient).all()


# -------------------------------------------------------------------------------- permutations


def test_the_best_of_all_permutations():
    targets, n = signals(3, 2, T), (T, T, 30)
    estimates = targets + 0.3 * signals(3, 2, T, seed=1)
    estimates[1] = estimates[1, ::-1]
    value, order = pit(np.float32(estimates), np.float32(targets), jnp.array(n))
    assert order.tolist() == [[0, 1], [1, 0], [0, 1]]
    for row in range(3):
        want = [
            si_snr_reference(estimates[row, q, : n[row]], targets[row, j, : n[row]])
            for j, q in enumerate(order[row])
        ]
        np.testing.assert_allclose(value[row], np.mean(want), atol=5e-4)
        # and it is the better of the two
        other = [
            si_snr_reference(estimates[row, 1 - q, : n[row]], targets[row, j, : n[row]])
            for j, q in enumerate(order[row])
        ]
        assert np.mean(other) < np.mean(want)


def test_permutation_says_which_estimate_belongs_to_a_target():
    targets = np.float32(signals(1, 3, T))
    estimates = targets[:, [1, 2, 0]]  # a cycle: its inverse is another permutation
    value, order = pit(estimates, targets, jnp.array([T]))
    assert order.tolist() == [[2, 0, 1]]
    np.testing.assert_array_equal(estimates[:, order[0]], targets)
    assert value[0] > 60


# ---------------------------------------------------------------------------------------- loss


def at_levels(*db):
    clean, noise = orthogonal()
    estimates = np.stack([clean + noise * 10 ** (-value / 20) for value in db])
    return np.float32(estimates[:, None]), np.float32(np.stack([clean] * len(db))[:, None])


def test_loss_is_the_mean_of_what_is_not_yet_good():
    estimates, targets = at_levels(4.0, -3.0, 29.0, 31.0)
    n = np.full(4, T)
    loss, gradient = loss_and_gradient(estimates, targets, n)
    assert loss == pytest.approx(-(4 - 3 + 29) / 3, abs=1e-3)
    np.testing.assert_array_equal(gradient[3], 0.0)
    assert (np.abs(gradient[:3]).max((1, 2)) > 0).all()
    assert loss_of(estimates, targets, n, threshold=-5.0) == pytest.approx(-0.5, abs=1e-3)


def test_filler_rows_do_not_count():
    estimates, targets = at_levels(4.0, -3.0, 8.0)
    weights = np.array([1.0, 1.0, 0.0])
    loss = loss_of(estimates, targets, np.full(3, T), weights)
    assert loss == pytest.approx(-0.5, abs=1e-3)


def test_loss_is_zero_where_everything_is_good():
    estimates, targets = at_levels(40.0, 35.0)
    value, gradient = loss_and_gradient(estimates, targets, np.full(2, T))
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_loss_of_two_speakers_takes_the_best_order():
    targets = np.float32(signals(2, 2, T))
    estimates = targets[:, ::-1] + np.float32(0.5 * signals(2, 2, T, seed=9))
    want = np.mean(
        [si_snr_reference(estimates[b, 1 - j], targets[b, j]) for b in (0, 1) for j in (0, 1)]
    )
    assert loss_of(estimates, targets, np.full(2, T)) == pytest.approx(-want, abs=1e-3)
