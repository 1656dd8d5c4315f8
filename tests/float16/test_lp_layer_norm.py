"""The module against `nnx.LayerNorm`, in float32 and in float16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.norm import LpLayerNorm
from edgespeech.ops.norm import PreNormalizer
from tests.support.modules import randomize

D = 144
X = np.random.default_rng(0).normal(size=(2, 5, D))
call = nnx.jit(lambda norm, x: norm(x))


def layer_norm():
    return randomize(nnx.LayerNorm(D, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("pre", [PreNormalizer.MAD, PreNormalizer.MAX_ABS])
def test_equals_layer_norm_with_its_parameters_and_gradients(pre):
    standard = layer_norm()
    norm = LpLayerNorm.from_layer_norm(standard, pre_normalizer=pre)
    x, weight = np.float32(X), np.float32(np.random.default_rng(1).normal(size=X.shape))

    @nnx.jit
    def value_and_gradient(norm, x):
        def loss(norm, x):
            return jnp.sum(weight * norm(x))

        return norm(x), *nnx.grad(loss, argnums=(0, 1))(norm, x)

    (y, params, dx), (want_y, want_params, want_dx) = (
        value_and_gradient(m, x) for m in (norm, standard)
    )
    np.testing.assert_allclose(y, want_y, atol=3e-6)
    np.testing.assert_allclose(dx, want_dx, atol=3e-6)
    for name in ("scale", "bias"):
        np.testing.assert_allclose(params[name][...], want_params[name][...], atol=5e-6)


def test_parameters_are_copied():
    standard = layer_norm()
    norm = LpLayerNorm.from_layer_norm(standard)
    norm.scale[...] = norm.scale[...] * 0
    assert np.abs(standard.scale[...]).max() > 0


@pytest.mark.parametrize("size", [1.0, 300.0, 2e4])
def test_float16_where_the_values_overflow_when_squared(size):
    standard = layer_norm()
    norm = LpLayerNorm.from_layer_norm(standard, dtype=jnp.float16)
    x = jnp.float16(np.clip(size * X, -65504, 65504))
    y = call(norm, x)
    assert y.dtype == jnp.float16
    want = np.asarray(call(standard, x.astype(jnp.float32)))
    assert np.abs(np.float32(y) - want).max() <= 4e-3 * np.abs(want).max()


def test_dtype():
    norm = LpLayerNorm(D, dtype=jnp.bfloat16, param_dtype=jnp.float16)
    assert norm.scale.dtype == norm.bias.dtype == jnp.float16
    assert call(norm, np.float32(X)).dtype == jnp.bfloat16
    assert call(LpLayerNorm(D), jnp.float16(X)).dtype == jnp.float16


def test_p_and_epsilon_are_used():
    y = call(LpLayerNorm(D, p=1, epsilon=0.25), np.float32(X))
    d = X - X.mean(-1, keepdims=True)
    want = d / (np.abs(d).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(y, want, atol=3e-6)


def test_jaxpr_has_no_float32_between_input_and_output():
    norm = LpLayerNorm(D, param_dtype=jnp.float16)
    text = str(jax.make_jaxpr(lambda x: norm(x))(jnp.float16(X)))
    assert "f32" not in text


def test_a_norm_without_parameters_is_refused():
    bare = nnx.LayerNorm(D, use_scale=False, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="without scale or bias"):
        LpLayerNorm.from_layer_norm(bare)
