"""Checks of low-precision operators: the worst rows for a norm or a softmax, float64 references, naive canaries."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from edgespeech.evaluation.rounding_oracle import oracle
from edgespeech.ops import norm, softmax
from edgespeech.ops.norm import PreNormalizer

FLOAT16_LIMIT = 4e-3


class Operator(NamedTuple):
    """An operator and its float64 reference.

    Attributes:
        call: `[r n] -> [r n]`.
        reference: value in float64.
        gradient: of `sum(g value)` in float64, from x and g; NaN in rows where it does not exist.
        cancels: the size `[r]` of what is subtracted in the gradient, from value and g: errors are measured in it.
    """

    call: Callable
    reference: Callable
    gradient: Callable
    cancels: Callable = lambda y, g: np.zeros(len(y))


def operators(dtype) -> dict[str, Operator]:
    """Every operator of the suite by name."""
    floor = norm.smallest_root_eps(dtype) ** 2

    def lp(p, eps, pre):
        held = max(eps, floor)

        def gradient(x, g):
            dx = norm.lp_normalize_gradient_reference(x, g, p, held)
            if p == 1:  # |d| has no derivative at 0: any sign would be right there
                d = np.abs(x - x.mean(-1, keepdims=True))
                dx[(d <= 1e-6 * d.max(-1, keepdims=True)).any(-1)] = np.nan
            return dx

        return Operator(
            lambda x: norm.lp_normalize(x, p, eps, pre),
            lambda x: norm.lp_normalize_reference(x, p, held),
            gradient,
        )

    def soft(table):
        def gradient(x, g):
            y = softmax.softmax_reference(x)
            return y * (g - (g * y).sum(-1, keepdims=True))

        return Operator(
            lambda x: softmax.softmax(x, table=table),
            softmax.softmax_reference,
            gradient,
            lambda y, g: y.max(-1) * np.abs(g).max(-1),  # of y g - y sum(g y)
        )

    return {
        "L2 MAD": lp(2, 1e-5, PreNormalizer.MAD),
        "L2 MAD eps 0": lp(2, 0.0, PreNormalizer.MAD),
        "L2 max-abs": lp(2, 1e-5, PreNormalizer.MAX_ABS),
        "L1 MAD": lp(1, 1e-5, PreNormalizer.MAD),
        "L3 max-abs": lp(3, 1e-5, PreNormalizer.MAX_ABS),
        "softmax": soft(None),
        "softmax table": soft(softmax.exp_table(dtype=dtype)),
    }


def families(n: int, dtype, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows `[3 n]` of every kind; the values in the names are those of float16, other formats scale them."""
    rng = np.random.default_rng(seed)
    top = float(jnp.finfo(dtype).max)
    unit, middle = top / 65504, np.sqrt(top) / np.sqrt(65504)

    def noise():
        return rng.normal(size=(3, n))

    zeros, place = np.zeros((3, n)), (np.arange(3), [0, n // 2, n - 1])
    one_hot, pair, bump, outlier = zeros.copy(), zeros.copy(), zeros + 2e4 * unit, noise()
    one_hot[place], outlier[place] = 6e4 * unit, 3e4 * unit
    pair[:, n // 3], pair[:, n // 2] = 6e4 * unit, -6e4 * unit
    bump[place] *= 1.01
    rows = {
        "one-hot 6e4": one_hot,
        "+-6e4 pair": pair,
        "+-65504": np.where(noise() > 0, top, -top),
        "2e4 + 50 N": unit * (2e4 + 50 * noise()),
        "1e-5 N": 1e-5 * noise(),
        "zeros": zeros,
        "constant 2e4": zeros + 2e4 * unit,
        "one step off 2e4": bump,
        "300 N": 300 * middle * noise(),
        "1000 + N": min(1000.0, top / 64) + noise(),
        "outlier 3e4": outlier,
        "N": noise(),
    }
    return {name: np.asarray(jnp.asarray(x, dtype)) for name, x in rows.items()}


def gradients(n: int, dtype, seed: int = 1) -> np.ndarray:
    """Cotangents `[3 n]`: of unit size, as large as the format allows (loss scaling), and small."""
    g = np.random.default_rng(seed).uniform(-1, 1, size=(3, n))
    return np.asarray(jnp.asarray(g * [[1.0], [float(jnp.finfo(dtype).max)], [1e-3]], dtype))


def value_and_gradient(call: Callable) -> Callable:
    """`(x, g) -> (y, dx)`."""

    def both(x, g):
        y, vjp = jax.vjp(call, x)
        return y, vjp(g)[0]

    return both


def canaries(run: Callable, dtype, n: int = 512) -> list[str]:
    """Naive code that has to fail; returns what did not, in words."""
    middle = 1.17 * float(np.sqrt(float(jnp.finfo(dtype).max)))
    x = np.asarray(jnp.asarray(middle * np.random.default_rng(0).normal(size=(3, n)), dtype))
    survivors = []
    y = run(lambda v: v * v / v)(jnp.full(8, middle, dtype))
    if np.isfinite(np.float64(y)).all():
        survivors.append(f"{middle:g}^2 / {middle:g} is finite")

    def naive(x):
        d = x - lax.reduce_sum(x, (1,))[:, None] / n
        return d / lax.sqrt(lax.reduce_sum(d * d, (1,))[:, None] / n + 1e-5)

    error = relative_error(run(naive)(x), norm.lp_normalize_reference(x))
    if error <= limit(dtype):
        survivors.append(f"a naive layer norm has error {error:.1e}")
    return survivors


def limit(dtype) -> float:
    """Largest relative error that passes: 4e-3 in float16, about eight rounding units in any format, 0.8 at most."""
    units = float(jnp.finfo(dtype).eps) / float(jnp.finfo(jnp.float16).eps)
    return min(FLOAT16_LIMIT * units, 0.8)


def relative_error(got, want, scale=0.0) -> float:
    """Largest difference in a row over the row's largest value, or over `scale` if that is larger; inf if not finite.

    Values near the format's smallest number have fewer digits: its distance from 0 counts as one rounding error.
    The format's largest number stands for everything beyond it as well. A row of NaN in `want` is not compared.
    """
    top = float(jnp.finfo(got.dtype).max)
    floor = norm.smallest(got.dtype) / float(jnp.finfo(got.dtype).eps)
    got, want = np.float64(got), np.float64(want)
    if not np.isfinite(got).all():
        return np.inf
    is_saturated = np.abs(got) >= top
    difference = np.where(
        is_saturated, np.maximum(0.0, top - np.sign(got) * want), np.abs(got - want)
    )
    size = np.maximum(np.maximum(np.abs(want).max(-1), scale), floor)
    return float(np.max(np.nan_to_num(difference.max(-1) / size)))


class Result(NamedTuple):
    """Largest relative errors of an operator on a family: of value and gradient, and of both against the oracle."""

    value: float = 0.0
    gradient: float = 0.0
    oracle: float = 0.0


def check(operator: Operator, run: Callable, n: int, dtype) -> dict[str, Result]:
    """Runs an operator on every family of n elements; `run` is the identity (eager) or `jax.jit`."""
    both = value_and_gradient(operator.call)
    function, g = run(both), gradients(n, dtype)
    results = {}
    for family, x in families(n, dtype).items():
        y, dx = function(jnp.asarray(x), jnp.asarray(g))
        want = operator.reference(x)
        want_dx = operator.gradient(np.float64(x), np.float64(g))
        scale = operator.cancels(want, np.float64(g))
        y_oracle, dx_oracle = oracle(both, x, g)
        results[family] = Result(
            relative_error(y, want),
            relative_error(dx, want_dx, scale),
            max(
                relative_error(y, y_oracle),
                relative_error(dx, dx_oracle, np.fmax(scale, np.abs(want_dx).max(-1))),
            ),
        )
    return results
