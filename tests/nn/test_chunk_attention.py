"""Chunk-wise attention against loops, and its contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.chunk_attention import FULL_CONTEXT, ChunkAttention, Chunks, chunk_mask
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.modules import randomize
from tests.support.streaming import verify_streaming_contract

D, H = 8, 2
call = nnx.jit(lambda module, x, lengths, chunks: module(x, lengths, chunks))


def make(chunk, left):
    return randomize(ChunkAttention(D, H, chunk=chunk, left=left, rngs=nnx.Rngs(0)))


def inputs(batch, n, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, n, D)).astype(np.float32)


def mask_by_loops(queries, keys, size, left):
    """Query i sees key j unless it is in a later chunk than its own, or in one too far back."""
    seen = np.zeros((len(queries), len(keys)), bool)
    for a, i in enumerate(queries):
        own = int(np.floor(i / size))
        for b, j in enumerate(keys):
            seen[a, b] = any(c * size <= j < (c + 1) * size for c in range(own - left, own + 1))
    return seen


@pytest.mark.parametrize(("size", "left"), [(1, 0), (1, 3), (3, 0), (3, 2), (4, 1), (50, 0)])
def test_mask(size, left):
    queries, keys = np.arange(3, 15), np.arange(-7, 15)
    got = jax.jit(chunk_mask)(queries, keys, Chunks(size, left))
    np.testing.assert_array_equal(got, mask_by_loops(queries, keys, size, left))


def test_full_context_sees_everything():
    places = np.arange(100)
    assert chunk_mask(places, places, FULL_CONTEXT).all()


def turned(x):
    """Rotary positions of one head `[n c]`, as complex numbers."""
    n, c = x.shape
    angle = np.arange(n)[:, None] * 10_000.0 ** (-np.arange(0, c, 2) / c)
    z = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angle)
    return np.stack([z.real, z.imag], -1).reshape(n, c)


def attention_by_loops(w, x, size, left):
    q, k, v = (
        reference.linear(reference.part(w, name), x) for name in ("q_proj", "k_proj", "v_proj")
    )
    places = np.arange(len(x))
    mask = mask_by_loops(places, places, size, left)
    c = D // H
    y = [
        reference.softmax_attention(turned(q[:, s]), turned(k[:, s]), v[:, s], mask)
        for s in (slice(h * c, (h + 1) * c) for h in range(H))
    ]
    return reference.linear(reference.part(w, "out_proj"), np.concatenate(y, axis=1))


@pytest.mark.parametrize(("size", "left"), [(3, 1), (100, 0)])
def test_attention_matches_the_equation(size, left):
    module, x, lengths = make(2, 0), inputs(2, 13), np.array([13, 8])
    chunks = Chunks(jnp.int32(size), jnp.int32(left))
    out = padding_contract(lambda x, n: call(module, x, n, chunks), x, lengths, rows=(1,))
    w = reference.parameters(module)
    for row, n in enumerate(lengths):
        want = attention_by_loops(w, np.float64(x[row, :n]), size, left)
        np.testing.assert_allclose(out[row, :n], want, atol=2e-5)


@pytest.mark.parametrize(("chunk", "left"), [(3, 2), (1, 4)])
def test_streaming_contract(chunk, left):
    module = make(chunk, left)
    out, _ = verify_streaming_contract(module, inputs, length=19)
    # The attributes are the default of the argument.
    traced = call(module, inputs(4, 19), np.array([19] * 4), Chunks(chunk, left))
    np.testing.assert_allclose(out[0], traced[0], atol=1e-6)


def test_an_hour_of_stream_is_as_exact_as_its_start():
    """Angles that grew with the frame number would lose their digits."""
    module, frames = make(2, 1), inputs(1, 4)
    step = nnx.jit(lambda module, x, state: module.step(x, jnp.array([2]), state))
    state = module.init_state(1)
    _, _, state = step(module, frames[:, :2], state)
    early, _, _ = step(module, frames[:, 2:], state)
    for _ in range(30):
        _, _, state = step(module, inputs(1, 2, seed=7), state)
    _, _, state = step(module, frames[:, :2], state)
    late, _, _ = step(module, frames[:, 2:], state)
    np.testing.assert_array_equal(early, late)


def test_bad_input():
    with pytest.raises(InputError, match="3 channels a head"):
        ChunkAttention(6, 2, chunk=1, left=0, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="chunk is 0 and left 1"):
        make(0, 1)
    module = make(3, 1)
    with pytest.raises(InputError, match="array of 0 frames"):
        module.step(jnp.zeros((1, 0, D)), jnp.array([0]), module.init_state(1))
