"""Softmax attention against float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.ops import attention as module
from edgespeech.ops.attention import AttentionMethod, attention
from tests.support.gradients import assert_gradient
from tests.support.reference import softmax_attention

METHODS = [AttentionMethod.REFERENCE, AttentionMethod.BLOCKWISE]
both = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of queries and keys, the last ones not full, in shapes that loops can check."""
    monkeypatch.setattr(module, "QUERY_BLOCK", 2)
    monkeypatch.setattr(module, "KEY_BLOCK", 3)


def jitted(method):
    return jax.jit(lambda q, k, v, mask: attention(q, k, v, mask, method))


def loops(q, k, v, mask):
    """Every utterance and head by itself, `[b n h c]`."""
    mask = np.broadcast_to(mask, (len(q), q.shape[2], q.shape[1], k.shape[1]))
    y = np.zeros((*q.shape[:3], v.shape[3]))
    for b, h in np.ndindex(len(q), q.shape[2]):
        y[b, :, h] = softmax_attention(q[b, :, h], k[b, :, h], v[b, :, h], mask[b, h])
    return y


def inputs(n=5, m=7, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(2, size, 3, 4)) for size in (n, m, m))
    mask = rng.random((2, 3, n, m)) < 0.5
    mask[..., 2] = True
    return scale * q, scale * k, v, mask


@both
def test_values_with_a_mask_of_each_head_and_query(method):
    q, k, v, mask = inputs()
    got = jitted(method)(*map(np.float32, (q, k, v)), mask)
    np.testing.assert_allclose(got, loops(q, k, v, mask), atol=2e-6)


@both
def test_mask_broadcasts_over_heads_and_queries(method):
    q, k, v, mask = inputs()
    mask = mask[:, :1, :1]
    got = jitted(method)(*map(np.float32, (q, k, v)), mask)
    np.testing.assert_allclose(got, loops(q, k, v, mask), atol=2e-6)


@both
def test_gradient(method):
    q, k, v, mask = inputs()
    assert_gradient(
        lambda q, k, v: attention(q, k, v, mask, method),
        lambda q, k, v: loops(q, k, v, mask),
        [q, k, v],
    )


@both
def test_large_scores_do_not_overflow(method):
    q, k, v, mask = inputs(scale=60.0)
    got = jitted(method)(*map(np.float32, (q, k, v)), mask)
    np.testing.assert_allclose(got, loops(q, k, v, mask), atol=1e-2)
    assert np.abs(got).max() > 0.5


@both
def test_masked_keys_have_no_weight_and_no_gradient(method):
    q, k, v, mask = (jnp.asarray(a) for a in inputs())
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    mask = mask.at[..., 5].set(False)
    want = jitted(method)(q, k, v, mask)
    np.testing.assert_array_equal(
        jitted(method)(q, k.at[:, 5].set(1e4), v.at[:, 5].set(1e4), mask), want
    )
    grads = jax.grad(lambda k, v: attention(q, k, v, mask, method).sum(), (0, 1))(k, v)
    for grad in grads:
        np.testing.assert_array_equal(grad[:, 5], 0.0)


@both
def test_query_that_sees_nothing_stays_finite(method):
    q, k, v, mask = inputs()
    q, k, v = map(np.float32, (q, k, v))
    mask[0, :, 1] = False
    out, vjp = jax.vjp(lambda *a: attention(*a, mask, method), q, k, v)
    assert all(np.isfinite(a).all() for a in (out, *vjp(jnp.ones_like(out))))


@both
def test_low_precision_keeps_its_dtype(method):
    q, k, v, mask = inputs()
    got = jitted(method)(*map(jnp.bfloat16, (q, k, v)), mask)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(got), loops(q, k, v, mask), atol=0.05)


@pytest.mark.parametrize("blocks", [(1, 1), (2, 7), (5, 3), (512, 8192)])
def test_forms_agree_for_any_blocks(monkeypatch, blocks):
    """Values and gradients, with the mask of every head and query, of every query, and of all."""
    monkeypatch.setattr(module, "QUERY_BLOCK", blocks[0])
    monkeypatch.setattr(module, "KEY_BLOCK", blocks[1])
    *operands, mask = inputs(scale=3.0)
    operands = [np.float32(a) for a in operands]
    for m in (mask, mask[:, :1], mask[:, :, :1], mask[:1, :1, :1]):
        results = []
        for method in METHODS:
            y, vjp = jax.vjp(lambda *a, m=m, method=method: attention(*a, m, method), *operands)
            results.append((y, *vjp(jnp.cos(y))))
        for got, want in zip(*results, strict=True):
            np.testing.assert_allclose(got, want, atol=5e-6)


def test_heads_in_one_product_agree_with_one_at_a_time(monkeypatch):
    q, k, v, mask = inputs()
    want = attention(*map(np.float32, (q, k, v)), mask, AttentionMethod.BLOCKWISE)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    got = attention(*map(np.float32, (q, k, v)), mask, AttentionMethod.BLOCKWISE)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_auto_keeps_long_audio_out_of_memory():
    """At 6000 frames the matrix of one head would take 144 MB; a block of it takes 12."""
    shape = jax.ShapeDtypeStruct((1, 6000, 2, 8), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 1, 1, 6000), jnp.bool_)

    def loss(q, k, v, mask):
        return attention(q, k, v, mask).sum()

    for function in (attention, jax.grad(loss, (0, 1, 2))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "QUERY_BLOCK", 512)
            patch.setattr(module, "KEY_BLOCK", 8192)
            memory = jax.jit(function).lower(*(shape,) * 3, mask).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 6000**2 * 4 / 2
