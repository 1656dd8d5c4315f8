"""The control mixers: removed attention and sliding-window attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.token_mixer_controls import Removed, SlidingWindowAttention, banded_attention
from edgespeech.ops.attention import attention_reference

call = nnx.jit(lambda mixer, x, lengths: mixer(x, lengths))


def test_removed_is_zero():
    x = jnp.full((2, 5, 4), jnp.nan)
    np.testing.assert_array_equal(Removed()(x, jnp.array([5, 2])), np.zeros((2, 5, 4)))


@pytest.mark.parametrize(("n", "window"), [(1, 1), (7, 1), (23, 4), (24, 8), (30, 200)])
def test_banded_equals_masked_full_attention(n, window):
    keys = jax.random.split(jax.random.key(n), 4)
    q, k, v, weight = (jax.random.normal(key, (2, n, 2, 3)) for key in keys)
    lengths = jnp.array([n, max(1, n // 2)])
    i = jnp.arange(n)
    valid = i[None] < lengths[:, None]
    band = jnp.abs(i[:, None] - i[None]) <= window
    full_mask = (band & valid[:, None, :])[:, None]
    # A padding query may see no key; only valid ones have a meaning.
    weight = jnp.where(valid[:, :, None, None], weight, 0.0)

    @jax.jit
    def compare(q, k, v):
        def both(function):
            out, vjp = jax.vjp(function, q, k, v)
            return jnp.where(valid[:, :, None, None], out, 0.0), vjp(weight)

        banded = both(lambda q, k, v: banded_attention(q, k, v, valid, window))
        return banded, both(lambda q, k, v: attention_reference(q, k, v, full_mask))

    (got, got_grads), (want, want_grads) = compare(q, k, v)
    np.testing.assert_allclose(got, want, atol=2e-6)
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_a_wide_window_is_the_attention_it_came_from():
    attention = SelfAttention(12, 3, rngs=nnx.Rngs(0))
    windowed = SlidingWindowAttention.from_attention(attention, 20, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (2, 20, 12))
    lengths = jnp.array([20, 13])
    want, got = call(attention, x, lengths), call(windowed, x, lengths)
    np.testing.assert_allclose(got[0], want[0], atol=2e-6)
    np.testing.assert_allclose(got[1, :13], want[1, :13], atol=2e-6)
    old, new = attention.q_proj.kernel[...], windowed.q_proj.kernel[...]
    assert old.unsafe_buffer_pointer() != new.unsafe_buffer_pointer()


def test_padding_and_neighbours_change_nothing():
    mixer = SlidingWindowAttention(12, 3, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 19, 12))
    lengths = jnp.array([19, 10])
    out = call(mixer, x, lengths)
    spoiled = x.at[1, 10:].set(jnp.nan).at[0].set(1e6)
    np.testing.assert_array_equal(call(mixer, spoiled, lengths)[1, :10], out[1, :10])
    alone = call(mixer, x[1:, :10], lengths[1:])
    np.testing.assert_allclose(alone[0], out[1, :10], atol=2e-6)


def test_receptive_field_is_the_window():
    mixer = SlidingWindowAttention(6, 2, 3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(2), (1, 20, 6))
    grad = jax.grad(lambda x: jnp.sum(mixer(x, jnp.array([20]))[0, 11] ** 2))(x)
    seen = np.flatnonzero(np.abs(grad[0]).max(-1) > 0)
    assert seen.tolist() == list(range(8, 15))


def test_errors():
    with pytest.raises(InputError, match="window is 0"):
        SlidingWindowAttention(6, 2, 0, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="multiple of num_heads"):
        SlidingWindowAttention(7, 2, 3, rngs=nnx.Rngs(0))
