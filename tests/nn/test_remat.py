"""Layers computed again in the backward pass: the same gradients and statistics, from less memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.nn.causal_conv import StreamingConvolution
from edgespeech.nn.chunk_attention import ChunkAttention, Chunks
from edgespeech.nn.conformer import ConformerLayer
from edgespeech.nn.decoder_layer import DecoderLayer
from edgespeech.nn.remat import rematerialised
from edgespeech.nn.streaming_conformer import StreamingConformerLayer
from edgespeech.nn.transformer import EncoderLayer, run_layers

B, N, D, H = 2, 48, 16, 2
LENGTHS = jnp.array([48, 31])
KEY = jax.random.key(3)
AGAIN = "remat|checkpoint"  # JAX's names for it


def encoder(rngs):
    return EncoderLayer(D, H, 64, norm_first=True, dropout_rate=0.2, rngs=rngs)


def conformer(rngs):
    return ConformerLayer(D, H, 64, 5, dropout_rate=0.2, conv_norm="batch", rngs=rngs)


def streaming(rngs):
    mixer = ChunkAttention(D, H, chunk=4, left=1, rngs=rngs)
    conv = StreamingConvolution(D, 5, 0.2, reach="chunk", chunk=4, rngs=rngs)
    return StreamingConformerLayer(D, mixer, conv, ffn_width=64, dropout_rate=0.2, rngs=rngs)


def decoder(rngs):
    return DecoderLayer(D, H, 64, D // H, rngs=rngs)


def one_after_another(arguments):
    def run(layers, x):
        for layer in layers:
            x = layer(x, LENGTHS, *arguments(x))
        return x

    return run


def scanned(layers, x):
    keys = list(jax.random.split(KEY, len(layers)))
    return run_layers(layers, x, LENGTHS, keys, scan=True)[-1]


STACKS = {
    "encoder": (encoder, scanned, 6),
    "conformer": (conformer, one_after_another(lambda x: (KEY,)), 2),
    "streaming": (
        streaming,
        one_after_another(lambda x: (Chunks(jnp.int32(6), jnp.int32(2)), KEY)),
        2,
    ),
    "decoder": (decoder, one_after_another(lambda x: (jnp.ones((B, 7, D)), jnp.array([7, 4]))), 2),
}


def build(stack):
    """The loss and its arguments: parameters, other state, and the input."""
    make, run, count = STACKS[stack]
    rngs = nnx.Rngs(0)
    layers = nnx.List(make(rngs) for _ in range(count))
    graphdef, params, rest = nnx.split(layers, nnx.Param, ...)

    def loss(params, rest, x):
        layers = nnx.merge(graphdef, params, rest, copy=True)
        y = jnp.where((jnp.arange(N) < LENGTHS[:, None])[..., None], run(layers, x), 0.0)
        return jnp.mean(jnp.sin(y)), nnx.state(layers, nnx.BatchStat)

    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, N, D)), jnp.float32)
    return loss, (params, rest, x)


def program_of(stack, remat):
    """The gradient as a compiled program, and its arguments."""
    loss, arguments = build(stack)
    with rematerialised(remat):
        lowered = jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True)).lower(*arguments)
    # Almost all of the time goes into compiling.
    return lowered.compile({"xla_backend_optimization_level": 0}), arguments


@pytest.mark.parametrize("stack", STACKS)
def test_the_same_gradients_and_statistics(stack):
    program, arguments = program_of(stack, remat=False)
    (value, statistics), gradients = program(*arguments)
    again, _ = program_of(stack, remat=True)
    (same_value, same_statistics), same_gradients = again(*arguments)
    np.testing.assert_allclose(same_value, value, rtol=0, atol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(same_gradients), strict=True):
        # Some, such as those of the keys' bias, are rounding alone: of what goes into them.
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6 * largest)
    before = jax.tree.leaves(nnx.filter_state(arguments[1], nnx.BatchStat))
    after, same_after = map(jax.tree.leaves, (statistics, same_statistics))
    assert len(before) == len(after) == (4 if stack == "conformer" else 0)
    for old, a, b in zip(before, after, same_after, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6)
        assert not np.array_equal(b, old)
    if stack == "encoder":
        # Layers that stand one by one gain on accelerators alone: XLA's CPU compiler merges the two computations again.
        assert temporary_bytes(again) < 0.5 * temporary_bytes(program)


def temporary_bytes(program):
    analysis = program.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("stack", STACKS)
def test_less_is_kept_for_the_backward_pass(stack):
    loss, arguments = build(stack)

    def kept(remat):
        with rematerialised(remat):
            backward = jax.eval_shape(lambda *a: jax.vjp(lambda *b: loss(*b)[0], *a)[1], *arguments)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    assert kept(remat=True) < 0.5 * kept(remat=False)


def test_off_again_after_an_error():
    x, layer = jnp.ones((1, 4, D)), encoder(nnx.Rngs(0))

    def trace():
        return str(jax.make_jaxpr(lambda x: layer(x, jnp.array([4])))(x))

    def fail_inside():
        with rematerialised():
            assert re.search(AGAIN, trace())
            raise KeyError

    plain = trace()
    assert not re.search(AGAIN, plain)
    with pytest.raises(KeyError):
        fail_inside()
    with rematerialised(False):
        assert trace() == plain
    assert trace() == plain
