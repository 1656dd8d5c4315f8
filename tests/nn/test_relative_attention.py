"""Sinusoids in closed form, relative attention against loops."""

import math

import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.relative_attention import RelativeSelfAttention, sinusoids
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.modules import randomize

D, H = 8, 2
call = nnx.jit(lambda module, x, lengths: module(x, lengths))


def sinusoid(position, d):
    row = np.zeros(d)
    for k in range(0, d, 2):
        angle = position / 10000 ** (k / d)
        row[k], row[k + 1] = math.sin(angle), math.cos(angle)
    return row


def relative_attention(w, x, num_heads):
    """One utterance, float64, with loops over queries and keys."""
    n, d = x.shape
    c = d // num_heads
    q, k, v = (reference.linear(reference.part(w, f"{name}_proj"), x) for name in "qkv")
    y = np.zeros((n, d))
    for h in range(num_heads):
        own = slice(h * c, (h + 1) * c)
        for i in range(n):
            scores = np.zeros(n)
            for j in range(n):
                r = (sinusoid(i - j, d) @ w["position_proj.kernel"])[own]
                content = (q[i, own] + w["content_bias"][h]) @ k[j, own]
                position = (q[i, own] + w["position_bias"][h]) @ r
                scores[j] = (content + position) / math.sqrt(c)
            weights = np.exp(scores - scores.max())
            y[i, own] = weights / weights.sum() @ v[:, own]
    return reference.linear(reference.part(w, "out_proj"), y)


def test_sinusoids():
    positions = np.array([-3, 0, 1, 50])
    want = np.stack([sinusoid(p, 6) for p in positions])
    np.testing.assert_allclose(sinusoids(positions, 6), want, atol=1e-5)


def test_relative_attention():
    module = randomize(RelativeSelfAttention(D, H, rngs=nnx.Rngs(0)), scale=0.5)
    x, lengths = np.random.default_rng(0).normal(size=(4, 7, D)), (7, 1, 2, 4)
    out = padding_contract(lambda x, n: call(module, x, n), np.float32(x), np.array(lengths))
    w = reference.parameters(module)
    for row, n in enumerate(lengths):
        want = relative_attention(w, x[row, :n], H)
        np.testing.assert_allclose(out[row, :n], want, atol=2e-5)


@pytest.mark.parametrize(("d", "heads"), [(8, 3), (9, 3)])
def test_width_is_refused(d, heads):
    with pytest.raises(InputError, match=f"width {d} must be even and a multiple of num_heads 3"):
        RelativeSelfAttention(d, heads, rngs=nnx.Rngs(0))
