"""The closed-form start of an LPA: against least squares in NumPy, column by column, and where it can be exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.conversion.fit import RIDGE, fit_linear_part
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA, set_anneal
from edgespeech.nn.lpa_config import LPAConfig
from tests.support.modules import randomize

D, HEADS = 12, 2
CONFIGS = {
    "all": LPAConfig(aperiodic=2, runs=1, periodic=1, positional=1, kernel_size=3, local_kernel_size=3),
    "content readout": LPAConfig(aperiodic=2, periodic=1, positional=0, readout="content", local_kernel_size=3),
    "no local path": LPAConfig(aperiodic=2, periodic=1, positional=1, local=False),
    "local path alone": LPAConfig.local_only(),
}  # fmt: skip


def make(name):
    """An LPA of random gates with the projections of a random attention, that attention, and audio-like inputs."""
    attention = randomize(SelfAttention(D, HEADS, rngs=nnx.Rngs(0)), 1)
    lpa = randomize(LPA.from_attention(attention, CONFIGS[name], rngs=nnx.Rngs(1)), 2)
    set_anneal(lpa, 0.5)
    x = jax.random.normal(jax.random.key(3), (3, 40, D))
    return lpa, attention, x, jnp.asarray([40, 31, 0])


def copy(module):
    return nnx.clone(module)


def output(lpa, alpha, taps, x, lengths):
    """Valid frames of the outputs, with these readouts and taps in place of the LPA's own."""
    lpa = copy(lpa)
    if alpha is not None:
        lpa.alpha[...] = jnp.asarray(alpha)
    if taps is not None:
        lpa.local_kernel[...] = jnp.asarray(np.repeat(taps, D // HEADS, axis=1))
        lpa.local_scale[...] = jnp.ones(HEADS)
    y = np.asarray(lpa(x, lengths), np.float64)
    return np.concatenate([row[:n].ravel() for row, n in zip(y, lengths, strict=True)])


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_least_squares_in_numpy(name):
    lpa, attention, x, lengths = make(name)
    y = attention(x, lengths)
    alpha = np.zeros(lpa.alpha.shape) if hasattr(lpa, "alpha") else None
    taps = np.zeros((lpa.config.local_kernel_size, HEADS)) if lpa.config.local else None
    parts = [part for part in (alpha, taps) if part is not None]
    base = output(lpa, alpha, taps, x, lengths)
    columns = []
    for part in parts:
        for index in np.ndindex(part.shape):
            part[index] = 1.0
            columns.append(output(lpa, alpha, taps, x, lengths) - base)
            part[index] = 0.0
    j = np.stack(columns, 1)
    target = (
        np.concatenate([np.asarray(r)[:n].ravel() for r, n in zip(y, lengths, strict=True)]) - base
    )
    # Ridge as rows of the system, solved by SVD and not by the normal equations.
    ridge = np.sqrt(RIDGE * np.mean(np.sum(j**2, 0)))
    system = np.concatenate([j, ridge * np.eye(j.shape[1])])
    expected, *_ = np.linalg.lstsq(system, np.append(target, np.zeros(j.shape[1])), rcond=None)

    fitted = copy(lpa)
    fit_linear_part(fitted, x, y, lengths)
    sizes = np.cumsum([part.size for part in parts])[:-1]
    found = iter(np.split(expected, sizes))
    scale = np.abs(expected).max()
    if alpha is not None:
        np.testing.assert_allclose(
            fitted.alpha[...], next(found).reshape(alpha.shape), rtol=0, atol=2e-4 * scale
        )
    if taps is not None:
        want = np.repeat(next(found).reshape(taps.shape), D // HEADS, axis=1)
        np.testing.assert_allclose(fitted.local_kernel[...], want, rtol=0, atol=2e-4 * scale)
        np.testing.assert_array_equal(fitted.local_scale[...], 1.0)


def test_what_an_lpa_can_say_is_found():
    """The outputs of an LPA with the same gates and other readouts: nothing but the ridge is left."""
    lpa, _, x, lengths = make("all")
    other = copy(lpa)
    rng = np.random.default_rng(4)
    other.alpha[...] = jnp.asarray(rng.normal(size=lpa.alpha.shape), jnp.float32)
    taps = np.repeat(rng.normal(size=(3, HEADS)), D // HEADS, axis=1)
    other.local_kernel[...] = jnp.asarray(taps, jnp.float32)
    other.local_scale[...] = jnp.ones(HEADS)
    y = other(x, lengths)
    fit_linear_part(lpa, x, y, lengths)
    got, want = (np.asarray(module(x, lengths))[0] for module in (lpa, other))
    assert np.square(got - want).mean() < 1e-4 * np.square(want).mean()


def test_padding_counts_nowhere():
    lpa, attention, x, lengths = make("all")
    y, again = attention(x, lengths), copy(lpa)
    fit_linear_part(lpa, x, y, lengths)
    far = jnp.arange(40)[None, :, None] >= lengths[:, None, None]
    fit_linear_part(again, jnp.where(far, jnp.nan, x), jnp.where(far, jnp.nan, y), lengths)
    np.testing.assert_array_equal(again.alpha[...], lpa.alpha[...])
    np.testing.assert_array_equal(again.local_kernel[...], lpa.local_kernel[...])
