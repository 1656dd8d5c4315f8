"""Lp layer normalisation that stays in range in any floating-point format.

    y_i = d_i / (mean_j |d_j|^p + eps^(p/2))^(1/p),    d = x - mean(x)

p = 2 is layer normalisation with its usual eps. In float16 the plain form overflows once a |d_j| passes 256. Here a row
is first divided by c D, with D its mean absolute deviation (MAD) and c a power of two that depends on n, p and the
format's largest number M:

    z = d / (c D),    y_i = z_i / (mean_j |z_j|^p + (sqrt(eps) / (c D))^p)^(1/p)

which is the same y, as D cancels. Zero mean gives |z_j| <= n / (2c), so |z_j|^p <= M once c >= (n/2) M^(-1/p).

Source: the MAD pre-normaliser and the claim of stability "in any Lp-norm using any floating point precision" are
those of arXiv 2312.10359, whose body was not at hand. The equations, the bounds and their proofs
(docs/theory/pre_normalizer.md), the arithmetic and the gradient are ours.
"""

import functools
import math
from enum import Enum

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from edgespeech.errors import InputError
from edgespeech.types import Array, Float


class PreNormalizer(Enum):
    """What a row is divided by before it is raised to the power p."""

    MAD = "mad"  # mean |d|, times the range constant: |z| <= n / (2c)
    MAX_ABS = "max_abs"  # max |d|: |z| <= 1; the tighter one for p >= 3
    NONE = "none"  # nothing: overflows where |d|^p does


# ------------------------------------------------------------------------------- what fits in range


def largest_base(p: int, dtype) -> float:
    """The largest z of the format whose rounded power `z^p` is finite, less a few units of rounding."""
    info = jnp.finfo(dtype)
    limit = (float(info.max) * (1 - p * float(info.eps) / 2)) ** (1 / p)
    step = float(info.eps) * 2.0 ** math.floor(math.log2(limit))
    return math.floor(limit / step) * step


def range_constant(n: int, p: int, dtype) -> float:
    """The smallest power of two c >= 1 with `(n / (2c))^p <= M`: c >= (n/2) M^(-1/p), M the largest number.

    float16, p = 2: 1 up to n = 511, 2 at 512, 4 at 1024, 8 at 2048.
    """
    return 2.0 ** max(0, math.ceil(math.log2(n / (2 * largest_base(p, dtype)))))


def smallest(dtype) -> float:
    """The smallest positive number to rely on: subnormal in float16 and float8, normal in wider ranges.

    XLA flushes subnormal numbers of float32, and so of bfloat16, to zero; at 1e-38 nothing is lost by it.
    """
    info = jnp.finfo(dtype)
    return float(info.tiny if info.nexp >= 8 else info.smallest_subnormal)


def smallest_root_eps(dtype) -> float:
    """What sqrt(eps) is at least, four times the smallest number: it survives the scaling of a row by 1/4."""
    return 4 * smallest(dtype)


def _check(n: int, p: int, eps: float, pre: PreNormalizer, dtype) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"lp_normalize got {dtype}: it needs a floating-point array; cast it")
    if n < 1 or p < 1 or p != int(p):
        raise InputError(f"lp_normalize got n = {n}, p = {p}: both must be whole and at least 1")
    if not 0.0 <= eps <= 1.0:
        raise InputError(f"lp_normalize got eps = {eps}: it must be in [0, 1]")
    if pre is PreNormalizer.NONE:
        return
    info = jnp.finfo(dtype)
    # The mean of |z|^p is at least c^-p (MAD) or 1/n (max-abs), and numbers below half the smallest are lost.
    gain = range_constant(n, p, dtype) ** p if pre is PreNormalizer.MAD else float(n)
    lost = gain * smallest(dtype) / 2 / p
    if lost > float(info.eps) / 2:
        raise InputError(
            f"lp_normalize of n = {n} elements with p = {p}, {pre.name} and {jnp.dtype(dtype).name}: underflow could "
            f"cost a relative error of {lost:.1e}, more than the {float(info.eps) / 2:.1e} of one rounding; take a "
            "wider dtype, a smaller n or p, or for p >= 3 MAX_ABS"
        )


# --------------------------------------------------------------------------------------- arithmetic


def pairwise_mean(x: Float[Array, "... d"]) -> Float[Array, "... 1"]:
    """Mean over the last axis by pairs, every operation in the dtype of x. Ours.

    Each step is `a + (b - a) / 2`: no intermediate value leaves the range of x (the difference fits while
    |x| <= M / 2 or x >= 0), equal elements give their value exactly, and the error grows with log2(n). XLA's own
    float16 sum differs from one backend to the next.
    """
    n = x.shape[-1]
    if n == 1:
        return x
    if n % 2:
        mean = pairwise_mean(x[..., :-1])
        return mean + (x[..., -1:] - mean) * (1.0 / n)
    a, b = x[..., : n // 2], x[..., n // 2 :]
    return pairwise_mean(a + (b - a) * 0.5)


def _centre(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """`x - mean(x)`, |x| <= M / 2; twice, as the first mean is rounded where it is large beside the deviations."""
    x = x - pairwise_mean(x)
    return x - pairwise_mean(x)


def _root(s: Array, p: int) -> Array:
    """`s^(1/p)`."""
    if p == 1:
        return s
    if p == 2:
        return lax.sqrt(s)
    # A rounded logarithm of up to 11 costs 2^-8 / p in float16; a Newton step squares that error.
    root = lax.exp(lax.log(s) * (1.0 / p))
    return root - (root - s / lax.integer_pow(root, p - 1)) * (1.0 / p)


def _clip(x: Array, limit: float) -> Array:
    """Brings x into [-limit, limit]; `jnp.clip` would carry its limits in float32."""
    return lax.max(lax.min(x, jnp.full_like(x, limit)), jnp.full_like(x, -limit))


def _saturating(x: Float[Array, "... d"], factor: Float[Array, "... 1"]) -> Float[Array, "... d"]:
    """`x factor`, factor >= 0, with the largest number in place of an overflow, which is NaN in float8_e4m3fn."""
    limit = float(jnp.finfo(x.dtype).max)
    held = jnp.broadcast_to(limit / jnp.maximum(factor, 1.0), x.shape)
    return lax.select(jnp.abs(x) >= held, jnp.sign(x) * limit, x * factor)


def _divide(x: Float[Array, "... d"], row: Float[Array, "... 1"]) -> Float[Array, "... d"]:
    """`x / row`. XLA turns a division by a broadcast into `x * (1 / row)`, which overflows for a small row."""
    return x / lax.optimization_barrier(jnp.broadcast_to(row, x.shape))


def _root_of_scale(x: Float[Array, "... d"]) -> Float[Array, "... 1"]:
    """Square root of the power of two that x is first multiplied by; y does not depend on it.

    1/4 leaves room for x - mean(x) and for differences inside a mean; a row below 1 is lifted instead, because 1/4
    would cost it bits among the subnormal numbers.
    """
    lift = 2.0 ** ((math.floor(math.log2(float(jnp.finfo(x.dtype).max))) - 3) // 2)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    lift, lower = jnp.full_like(largest, lift), jnp.full_like(largest, 0.5)
    return lax.select(largest < jnp.ones_like(largest), lift, lower)


def _forward(x, p, eps, pre):
    n, dtype = x.shape[-1], x.dtype
    e = max(math.sqrt(eps), smallest_root_eps(dtype))
    if pre is PreNormalizer.NONE:
        root_of_scale, c = jnp.ones_like(x[..., :1]), 1.0
        d, D = _centre(x), root_of_scale
    else:
        root_of_scale = _root_of_scale(x)
        scale = root_of_scale * root_of_scale
        d, e = _centre(x * scale), scale * e
        if pre is PreNormalizer.MAD:
            D, c = pairwise_mean(jnp.abs(d)), range_constant(n, p, dtype)
        else:
            D, c = jnp.max(jnp.abs(d), axis=-1, keepdims=True), 1.0
        D = jnp.maximum(D, e)
    z = _divide(d, D) * (1.0 / c)
    r = e / D * (1.0 / c)
    if pre is not PreNormalizer.NONE:
        # In exact arithmetic z is inside; a rounded D may put a one-hot row a few units past the bound.
        limit = largest_base(p, dtype)
        z = _clip(z, limit)
    norm = _root(pairwise_mean(lax.integer_pow(jnp.abs(z), p)) + lax.integer_pow(r, p), p)
    return z / norm, (norm * c, root_of_scale / lax.sqrt(D))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _normalize(x, p, eps, pre):
    return _forward(x, p, eps, pre)[0]


def _normalize_forward(x, p, eps, pre):
    y, (norm, k) = _forward(x, p, eps, pre)
    return y, (y, norm, k)


def _normalize_backward(p, eps, pre, saved, g):
    """`dx = centre(g - psi mean(g y)) / N`, `psi = sign(y) |y|^(p-1)`, `1 / N = k^2 / norm` with N the row's norm."""
    del eps, pre
    y, norm, k = saved
    # A gradient of unit size: g may be as large as the format allows (loss scaling), and |mean(g y)| <= max|g|.
    size = jnp.max(jnp.abs(g), axis=-1, keepdims=True)
    size = jnp.maximum(size, smallest(g.dtype))
    g = _divide(g, size)
    psi = jnp.sign(y) * lax.integer_pow(jnp.abs(y), p - 1)
    t = _centre(g - psi * pairwise_mean(g * y))
    # In two factors: t k leaves the range only where t k k does.
    k = _saturating(k, lax.sqrt(size))
    return (_saturating(lax.optimization_barrier(_saturating(t / norm, k)), k),)


_normalize.defvjp(_normalize_forward, _normalize_backward)


def lp_normalize(
    x: Float[Array, "... d"],
    p: int = 2,
    eps: float = 1e-5,
    pre_normalizer: PreNormalizer = PreNormalizer.MAD,
) -> Float[Array, "... d"]:
    """`y = d / (mean |d|^p + eps^(p/2))^(1/p)`, `d = x - mean(x)`, over the last axis, in the dtype of x alone.

    Every finite x gives a finite y (MAD, MAX_ABS). The gradient is that of the formula, with no intermediate overflow;
    a component too large for the format saturates at its largest number. sqrt(eps) is at least four times the format's
    smallest number, so a constant row gives 0 for every eps.

    Args:
        x: any floating dtype; in float8 every operation is rounded to 2 or 3 bits.
        p: exponent of the norm, a whole number.
        eps: as in layer normalisation, in units of x squared.
        pre_normalizer: what keeps powers in range.

    Returns:
        `[... d]`, |y| <= d^(1/p), the dtype of x.

    Raises:
        InputError: x is not floating, p or eps is out of range, or n and p are too large for the dtype.
    """
    _check(x.shape[-1], p, eps, pre_normalizer, x.dtype)
    return _normalize(x, int(p), float(eps), pre_normalizer)


def lp_normalize_reference(x, p: int = 2, eps: float = 1e-5) -> np.ndarray:
    """`lp_normalize` in float64, straight from the formula."""
    x = np.asarray(x, np.float64)
    d = x - x.mean(-1, keepdims=True)
    d = d - d.mean(-1, keepdims=True)
    norm = ((np.abs(d) ** p).mean(-1, keepdims=True) + eps ** (p / 2)) ** (1 / p)
    return np.divide(d, norm, out=np.zeros_like(d), where=norm > 0)


def lp_normalize_gradient_reference(x, g, p: int = 2, eps: float = 1e-5) -> np.ndarray:
    """Gradient of `sum(g lp_normalize(x))` with respect to x, in float64, from the Jacobian by the chain rule.

    `dy_i / dd_j = delta_ij / N - d_i / N^2 dN/dd_j`, `dN/dd_j = sign(d_j) |d_j|^(p-1) N^(1-p) / n`.
    """
    x, g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    n = x.shape[-1]
    d = x - x.mean(-1, keepdims=True)
    d = d - d.mean(-1, keepdims=True)
    norm = ((np.abs(d) ** p).mean(-1, keepdims=True) + eps ** (p / 2)) ** (1 / p)
    d_norm = np.sign(d) * np.abs(d) ** (p - 1) * norm ** (1 - p) / n
    d_d = g / norm - (g * d).sum(-1, keepdims=True) / norm**2 * d_norm
    return d_d - d_d.mean(-1, keepdims=True)


# ------------------------------------------------------------------------------- scale and shift


@jax.custom_vjp
def scale_shift(
    y: Float[Array, "... d"], scale: Float[Array, "d"], bias: Float[Array, "d"]
) -> Float[Array, "... d"]:
    """`y scale + bias` in the dtype of y; the gradients of scale and bias are summed in their own dtype.

    With float32 parameters on float16 activations, the sum over frames is then a float32 sum.
    """
    return y * scale.astype(y.dtype) + bias.astype(y.dtype)


def _scale_shift_forward(y, scale, bias):
    return scale_shift(y, scale, bias), (y, scale, bias)


def _scale_shift_backward(saved, g):
    y, scale, bias = saved
    rows = tuple(range(y.ndim - 1))
    d_scale = lax.reduce_sum(g.astype(scale.dtype) * y.astype(scale.dtype), rows)
    d_bias = lax.reduce_sum(g.astype(bias.dtype), rows)
    return g * scale.astype(y.dtype), d_scale, d_bias


scale_shift.defvjp(_scale_shift_forward, _scale_shift_backward)
