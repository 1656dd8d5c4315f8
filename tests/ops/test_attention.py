"""Softmax attention against float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np

from edgespeech.ops.attention import attention_reference
from tests.support.gradients import assert_gradient
from tests.support.reference import softmax_attention

attention = jax.jit(attention_reference)


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


def test_values_with_a_mask_of_each_head_and_query():
    q, k, v, mask = inputs()
    got = attention(*map(np.float32, (q, k, v)), mask)
    np.testing.assert_allclose(got, loops(q, k, v, mask), atol=2e-6)


def test_mask_broadcasts_over_heads_and_queries():
    q, k, v, mask = inputs()
    mask = mask[:, :1, :1]
    got = attention(*map(np.float32, (q, k, v)), mask)
    np.testing.assert_allclose(got, loops(q, k, v, mask), atol=2e-6)


def test_gradient():
    q, k, v, mask = inputs()
    assert_gradient(
        lambda q, k, v: attention_reference(q, k, v, mask),
        lambda q, k, v: loops(q, k, v, mask),
        [q, k, v],
    )


def test_large_scores_do_not_overflow():
    q, k, v, mask = inputs(scale=60.0)
    got = attention(*map(np.float32, (q, k, v)), mask)
    np.testing.assert_allclose(got, loops(q, k, v, mask), atol=1e-2)
    assert np.abs(got).max() > 0.5


def test_masked_keys_have_no_weight_and_no_gradient():
    q, k, v, mask = (jnp.asarray(a) for a in inputs())
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    mask = mask.at[..., 5].set(False)
    want = attention(q, k, v, mask)
    np.testing.assert_array_equal(
        attention(q, k.at[:, 5].set(1e4), v.at[:, 5].set(1e4), mask), want
    )
    grads = jax.grad(lambda k, v: attention(q, k, v, mask).sum(), (0, 1))(k, v)
    for grad in grads:
        np.testing.assert_array_equal(grad[:, 5], 0.0)


def test_query_that_sees_nothing_stays_finite():
    q, k, v, mask = inputs()
    q, k, v = map(np.float32, (q, k, v))
    mask[0, :, 1] = False
    out, vjp = jax.vjp(lambda *a: attention(*a, mask), q, k, v)
    assert all(np.isfinite(a).all() for a in (out, *vjp(jnp.ones_like(out))))


def test_low_precision_keeps_its_dtype():
    q, k, v, mask = inputs()
    got = attention(*map(jnp.bfloat16, (q, k, v)), mask)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(got), loops(q, k, v, mask), atol=0.05)
