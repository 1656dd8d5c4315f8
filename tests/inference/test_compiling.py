"""Options of compilation: they change the plan of memory and no result, and are left out where they are not known."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.inference import compiling
from edgespeech.inference.compiling import inference_options
from edgespeech.nn.transformer import EncoderLayer


def test_less_memory_and_the_same_values():
    assert inference_options()
    layers = [
        EncoderLayer(128, 4, 512, norm_first=False, dropout_rate=0.0, rngs=nnx.Rngs(i))
        for i in range(6)
    ]
    graphdef, state = nnx.split(nnx.List(layers))

    def encoder(state, x, lengths):
        for layer in nnx.merge(graphdef, state):
            x = layer(x, lengths)
        return x

    inputs = state, jax.random.normal(jax.random.key(0), (1, 1600, 128)), jnp.array([1500])
    plain, lean = (
        jax.jit(encoder, compiler_options=options).lower(*inputs).compile()
        for options in (None, inference_options())
    )
    np.testing.assert_allclose(lean(*inputs), plain(*inputs), rtol=0, atol=1e-6)
    planned, most = (c.memory_analysis().temp_size_in_bytes for c in (lean, plain))
    assert planned < 0.7 * most


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(compiling, "_CPU", {"xla_cpu_no_such_option": True})
    inference_options.cache_clear()
    assert inference_options() == {}
    inference_options.cache_clear()
