"""Self-attention against float64 loops, and the contracts of a token mixer."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.attention import SelfAttention
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.modules import randomize

D, H = 12, 3
LENGTHS = (11, 6, 1)
call = nnx.jit(lambda mixer, x, lengths: mixer(x, lengths))


def mixer(**kwargs):
    return randomize(SelfAttention(D, H, rngs=nnx.Rngs(0), **kwargs))


def inputs():
    return np.random.default_rng(1).normal(size=(3, 11, D))


def test_matches_the_equation_and_ignores_padding():
    attention, x = mixer(), inputs()
    out = padding_contract(lambda x, n: call(attention, x, n), np.float32(x), LENGTHS)
    w = reference.parameters(attention)
    assert set(w) == {
        f"{p}_proj.{part}" for p in ("q", "k", "v", "out") for part in ("kernel", "bias")
    }
    for row, n in enumerate(LENGTHS):
        want = reference.self_attention(w, x[row, :n], H)
        np.testing.assert_allclose(out[row, :n], want, atol=1e-5)


def test_gradient_ignores_padding():
    attention, x, lengths = mixer(), np.float32(inputs()), jnp.array(LENGTHS)
    mask = jnp.arange(11)[None, :, None] < lengths[:, None, None]

    @nnx.jit
    def gradient(attention, x):
        def loss(attention, x):
            return jnp.sum(jnp.where(mask, attention(x, lengths), 0.0) ** 2)

        return nnx.grad(loss, argnums=(0, 1))(attention, x)

    params, x_grad = gradient(attention, x)
    spoiled, x_spoiled = gradient(attention, jnp.where(mask, x, jnp.nan))
    got, want = reference.parameters_of_state(spoiled), reference.parameters_of_state(params)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
    np.testing.assert_array_equal(x_spoiled, x_grad)
    np.testing.assert_array_equal(jnp.where(mask, 0.0, x_grad), 0.0)
    assert np.abs(np.asarray(x_grad)[0]).min() > 0


def test_order_of_frames_does_not_matter():
    attention, x = mixer(), np.float32(inputs()[:1])
    order = np.random.default_rng(2).permutation(11)
    n = jnp.array([11])
    np.testing.assert_allclose(
        call(attention, x[:, order], n), call(attention, x, n)[:, order], atol=1e-5
    )


def test_low_precision():
    attention, low = mixer(), mixer(dtype=jnp.bfloat16)
    x, lengths = np.float32(inputs()), jnp.array(LENGTHS)
    out = call(low, x, lengths)
    assert out.dtype == jnp.bfloat16
    want = np.asarray(call(attention, x, lengths))
    assert np.abs(np.float32(out)[0] - want[0]).max() < 0.03 * np.abs(want[0]).max()


def test_width_must_divide():
    with pytest.raises(InputError, match="width 10 is not a multiple of num_heads 3"):
        SelfAttention(10, 3, rngs=nnx.Rngs(0))
