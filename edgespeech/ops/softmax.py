"""Softmax in low precision, and with a lookup table for the exponential.

    t = max(x - max(x), -D),    w = exp(t),    y = (w / mean(w)) / n

"Conditional re-scaling" of softmax for lookup-table hardware is from arXiv 2312.10359, known second-hand; this form
of it is ours. Three steps bring every intermediate value into range: the maximum is subtracted (w <= 1), t is clamped
to the table's domain [-D, 0], and the sum is a mean, in [1/n, 1]. Dividing the logits by their range instead would be
another function.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from edgespeech.errors import InputError
from edgespeech.ops.norm import pairwise_mean, smallest
from edgespeech.types import Array, Bool, Float

DOMAIN = 16.0  # e^-16 = 1.1e-7 is two units of the smallest float16 number


def exp_table(num_intervals: int = 256, domain: float = DOMAIN, dtype=jnp.float16) -> Array:
    """`exp` at `num_intervals + 1` equal steps from 0 down to -domain, rounded to dtype."""
    if num_intervals < 1 or not domain > 0:
        raise InputError(
            f"exp_table got num_intervals = {num_intervals}, domain = {domain}: "
            "take at least one interval and a positive domain"
        )
    return jnp.asarray(np.exp(-np.linspace(0.0, domain, num_intervals + 1)), dtype)


def table_error(num_intervals: int, domain: float = DOMAIN) -> float:
    """Largest relative error of `table_exp`, rounding apart: `h^2 / 8 e^h`, h the step. Ours.

    A chord of exp over [a, a + h] lies above it, by at most h^2 / 8 times the largest second derivative, e^(a + h), and
    exp is at least e^a there. 256 intervals over 16: 5.2e-4, about one rounding of float16.
    """
    h = domain / num_intervals
    return h * h / 8 * math.exp(h)


def table_exp(t: Float[Array, "..."], table: Float[Array, "k"], domain: float = DOMAIN) -> Array:
    """`exp(t)` for t in [-domain, 0] by linear interpolation in `exp_table`, in the dtype of t."""
    last = table.shape[0] - 1
    position = t * (-last / domain)
    index = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, last - 1)
    fraction = position - index.astype(t.dtype)
    table = table.astype(t.dtype)
    left, right = jnp.take(table, index, mode="clip"), jnp.take(table, index + 1, mode="clip")
    return left + (right - left) * fraction


def softmax(
    x: Float[Array, "... n"],
    mask: Bool[Array, "... n"] | None = None,
    table: Float[Array, "k"] | None = None,
    domain: float = DOMAIN,
) -> Float[Array, "... n"]:
    """Softmax over the last axis, every operation in the dtype of x, finite for every finite x.

    Clamping adds at most e^-D to each w, which moves y by at most `max(e^-D, n e^-D y) <= n e^-D`: 2.3e-4 for n = 2048
    and D = 16. A table makes every w too large by a factor in [1, 1 + r], r = `table_error`, which changes y by a
    relative r at most. Rounding comes on top. The gradient is `y (g - sum(g y))`.

    Args:
        x: logits, any floating dtype.
        mask: True = counts; the rest gets exactly 0, and so does a row without anything to count. Broadcast to x.
        table: from `exp_table`, to interpolate in it; None: the exponential function.
        domain: D.

    Returns:
        `[... n]`, the dtype of x.

    Raises:
        InputError: x is not floating, or n is larger than what the dtype can hold.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"softmax got {x.dtype}: it needs a floating-point array; cast it")
    limit = float(jnp.finfo(x.dtype).max)
    if x.shape[-1] > limit:
        raise InputError(
            f"softmax over n = {x.shape[-1]} in {x.dtype}, whose largest number is {limit:g}: "
            "w / mean(w) may be as large as n; take a wider dtype"
        )
    if mask is None:
        mask = jnp.ones(x.shape[-1], bool)
    return _softmax(x, jnp.broadcast_to(mask, x.shape), table, domain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _softmax(x, mask, table, domain):
    weights, mean = _weights(x, mask, table, domain)
    return _divide(weights, mean)


def _weights(x, mask, table, domain):
    x = lax.select(mask, x, jnp.full_like(x, -float(jnp.finfo(x.dtype).max)))
    # In halves, as the difference of the two ends of the format is beyond it.
    half = x * 0.5
    t = 2 * jnp.maximum(half - jnp.max(half, axis=-1, keepdims=True), -0.5 * domain)
    weights = lax.exp(t) if table is None else table_exp(t, table, domain)
    weights = lax.select(mask, weights, jnp.zeros_like(weights))
    mean = jnp.maximum(pairwise_mean(weights), float(jnp.finfo(x.dtype).tiny))
    return weights, mean


def _divide(weights, mean):
    return weights / mean * (1.0 / weights.shape[-1])


def _softmax_forward(x, mask, table, domain):
    weights, mean = _weights(x, mask, table, domain)
    return _divide(weights, mean), (weights, mean, table)


def _softmax_backward(domain, saved, g):
    del domain
    weights, mean, table = saved
    # Of unit size, as g may be as large as the format allows; w in place of y, as y g / n would underflow.
    size = jnp.max(jnp.abs(g), axis=-1, keepdims=True)
    size = jnp.maximum(size, smallest(g.dtype))
    g = g / lax.optimization_barrier(jnp.broadcast_to(size, g.shape))
    inner = pairwise_mean(weights * g) / mean
    dx = _divide(weights, mean) * (g - inner) * size
    return dx, None, None if table is None else jnp.zeros_like(table)


_softmax.defvjp(_softmax_forward, _softmax_backward)


def softmax_reference(x, mask=None) -> np.ndarray:
    """`softmax` in float64 without clamp or table."""
    x = np.asarray(x, np.float64)
    mask = np.broadcast_to(True if mask is None else np.asarray(mask), x.shape)
    x = np.where(mask, x, -np.inf)
    top = x.max(-1, keepdims=True)
    weights = np.where(mask, np.exp(x - np.where(np.isfinite(top), top, 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
