"""SummaryMixing against a plain loop in float64, under padding, and from an attention."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.rotary import RotarySelfAttention
from edgespeech.nn.summary_mixing import SummaryMixing
from tests.support.contracts import padding_contract
from tests.support.modules import randomize

D = 6


def gelu(x):
    """The tanh form, jax.nn.gelu's default."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + np.tanh(inner))


def reference(mixer, x):
    """One utterance `[n d]`, float64, a frame at a time."""

    def w(layer):
        return np.asarray(layer.kernel[...], np.float64)

    def b(layer):
        return np.asarray(layer.bias[...], np.float64)

    summary = np.zeros(D)
    for frame in x:
        summary += gelu(frame @ w(mixer.v_proj) + b(mixer.v_proj)) / len(x)
    rows = []
    for frame in x:
        f = gelu(frame @ w(mixer.local) + b(mixer.local))
        rows.append(f @ w(mixer.combine) + summary @ w(mixer.out_proj) + b(mixer.out_proj))
    return np.stack(rows)


def test_values_and_gradients_against_the_loop():
    mixer = randomize(SummaryMixing(D, rngs=nnx.Rngs(0)), 0, 0.7)
    x = np.random.default_rng(0).normal(size=(2, 7, D)).astype(np.float32)
    lengths = np.array([7, 4])
    y = np.asarray(mixer(x, lengths))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(y[row, :n], reference(mixer, np.float64(x[row, :n])), atol=1e-5)

    weights = np.random.default_rng(1).normal(size=(7, D))

    def value(x):
        return (mixer(x[None], np.array([7]))[0] * weights).sum()

    gradient = np.asarray(jax.grad(value)(x[0]))
    for position in ((0, 0), (3, 5), (6, 2)):
        step = np.zeros((7, D))
        step[position] = 1e-5
        ends = [(reference(mixer, x[0] + s * step) * weights).sum() for s in (1, -1)]
        assert gradient[position] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-4)


def test_padding():
    mixer = randomize(SummaryMixing(D, rngs=nnx.Rngs(0)), 0, 0.7)
    x = np.random.default_rng(0).normal(size=(3, 9, D)).astype(np.float32)
    graphdef, state = nnx.split(mixer)
    call = jax.jit(lambda x, lengths: nnx.merge(graphdef, state)(x, lengths))
    padding_contract(call, x, np.array([9, 5, 1]))


@pytest.mark.parametrize("kind", [SelfAttention, RotarySelfAttention])
def test_from_attention(kind):
    sizes = (D, 2) if kind is SelfAttention else (D, 2, 2)
    attention = kind(*sizes, rngs=nnx.Rngs(0))
    mixer = SummaryMixing.from_attention(attention, rngs=nnx.Rngs(1))
    for name in ("v_proj", "out_proj"):
        ours, theirs = getattr(mixer, name), getattr(attention, name)
        np.testing.assert_array_equal(ours.kernel[...], theirs.kernel[...])
        assert (
            ours.kernel[...].unsafe_buffer_pointer() != theirs.kernel[...].unsafe_buffer_pointer()
        )
        if theirs.bias is None:
            np.testing.assert_array_equal(ours.bias[...], np.zeros(D))
