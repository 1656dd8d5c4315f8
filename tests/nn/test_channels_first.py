"""The (B, C, 1, S) graph against the standard layout with the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.evaluation.macs import equations
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.channels_first import (
    ChannelsFirstAttention,
    ChannelsFirstFeedForward,
    from_channels_first,
    to_channels_first,
)
from edgespeech.nn.transformer import FeedForward
from tests.support.contracts import padding_contract
from tests.support.modules import randomize

D, H, N = 12, 3, 11
LENGTHS = jnp.array([N, 6, 1])
X = np.float32(np.random.default_rng(1).normal(size=(3, N, D)))
# Float32 rounding of values around 1 through four products: a few units of 6e-8.
EXACT = {"rtol": 0, "atol": 2e-6}


def attention(chunk_size=None):
    standard = randomize(SelfAttention(D, H, rngs=nnx.Rngs(0)))
    return standard, ChannelsFirstAttention(standard, chunk_size=chunk_size)


def feed_forward(chunk_size=None):
    standard = randomize(FeedForward(D, 4 * D, 0.0, rngs=nnx.Rngs(0)))
    return standard, ChannelsFirstFeedForward(standard, chunk_size=chunk_size)


def test_layout_and_back():
    y = to_channels_first(X)
    assert y.shape == (3, D, 1, N)
    np.testing.assert_array_equal(y[1, 5, 0], X[1, :, 5])
    np.testing.assert_array_equal(from_channels_first(y), X)


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 11, 100])
def test_attention_equals_the_standard_layout(chunk_size):
    standard, graph = attention(chunk_size)
    got = nnx.jit(lambda m, x: from_channels_first(m(to_channels_first(x), LENGTHS)))(graph, X)
    want = nnx.jit(lambda m, x: m(x, LENGTHS))(standard, X)
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(got[row, :n], want[row, :n], **EXACT)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_feed_forward_equals_the_standard_layout(chunk_size):
    standard, graph = feed_forward(chunk_size)
    got = nnx.jit(lambda m, x: from_channels_first(m(to_channels_first(x))))(graph, X)
    np.testing.assert_allclose(got, nnx.jit(lambda m, x: m(x))(standard, X), **EXACT)


def test_gradients_equal_those_of_the_standard_layout():
    standard, graph = attention(4)
    weight = np.float32(np.random.default_rng(2).normal(size=X.shape))
    weight[np.arange(N) >= np.asarray(LENGTHS)[:, None]] = 0

    @nnx.jit
    def gradient(standard, graph, x):
        def one(m, x):
            return jnp.sum(weight * m(x, LENGTHS))

        def other(m, x):
            return jnp.sum(weight * from_channels_first(m(to_channels_first(x), LENGTHS)))

        return nnx.grad(one, argnums=(0, 1))(standard, x), nnx.grad(other, argnums=(0, 1))(graph, x)

    (params, dx), (graph_params, graph_dx) = gradient(standard, graph, X)
    np.testing.assert_allclose(graph_dx, dx, rtol=0, atol=1e-5)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        got = np.asarray(graph_params[name]["kernel"][...])[:, :, 0, 0].T
        np.testing.assert_allclose(got, params[name]["kernel"][...], rtol=0, atol=2e-5)


def test_padding_never_counts():
    _, graph = attention(4)
    call = jax.jit(lambda x, n: from_channels_first(graph(to_channels_first(x), jnp.asarray(n))))
    padding_contract(call, X, [11, 6, 1], rows=(1, 2))


@pytest.mark.parametrize("build", [attention, feed_forward])
def test_nothing_is_reshaped_and_every_tensor_has_four_axes(build):
    _, graph = build(4)
    arguments = (to_channels_first(X), LENGTHS) if build is attention else (to_channels_first(X),)
    operations = list(equations(jax.make_jaxpr(lambda *a: graph(*a))(*arguments).jaxpr))
    names = [e.primitive.name for e in operations]
    assert "reshape" not in names
    assert names.count("conv_general_dilated") == (4 if build is attention else 2 * 3)
    # Two einsums for each head and chunk of 4 of 11 queries.
    assert names.count("dot_general") == (2 * H * 3 if build is attention else 0)
    largest = max(v.aval.size for e in operations for v in e.outvars)
    assert largest <= max(3 * N * 4, 3 * D * N, 3 * 4 * D * 4)


def test_float16_masks_stay_finite():
    _, graph = attention()
    x = to_channels_first(jnp.float16(X))
    out = graph(x, LENGTHS)
    assert out.dtype == jnp.float16
    want = np.asarray(graph(x.astype(jnp.float32), LENGTHS))
    assert np.abs(np.float32(out) - want).max() < 4e-3 * np.abs(want).max()


@pytest.mark.parametrize("build", [attention, feed_forward])
def test_chunk_size_must_be_positive(build):
    with pytest.raises(InputError, match="chunk_size is 0: it must be at least 1"):
        build(0)
