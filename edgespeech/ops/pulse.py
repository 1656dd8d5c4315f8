"""Pulse gates: which frames a pulse of Learnable Pulse Accumulation (LPA) opens.

Source of the idea: LPA (arXiv 2603.16922), whose pulses are content-dependent rectangles, periodic
windows and position-dependent basis functions that collapse to binary. The equations here are ours.

`*_gates(..., tau, hard)` gives `[b h p n]`, 0 on padding. Positions and widths are in frames,
float32.

- `hard` an array or float: float32 gates of temperature `tau`, mixed with the binary gate by the
  straight-through strength `hard` in [0, 1]. `hard = 0` is the soft gate; `hard = 1` has the exact
  0/1 value and the soft gate's gradient. Both are traced scalars: annealing never recompiles.
- `hard=True`, static: the binary gate alone, boolean, from broadcast comparisons (no sigmoid, no
  `nonzero`, no read-back to the host); equal to the value at `hard = 1`, and `tau` is not read.

`*_gates_reference` are float64 NumPy loops that read like the equation.
"""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from edgespeech.ops.mask import mask_from_lengths
from edgespeech.types import Array, Bool, Float, Int, Lengths, Mask, Scalar

MIN_PERIOD = 2.0

Hard: TypeAlias = Scalar | float | bool
Gates: TypeAlias = Float[Array, "b h p n"] | Bool[Array, "b h p n"]


def _frames(n: int) -> Float[Array, "n"]:
    return jnp.arange(n, dtype=jnp.float32)


def _straight_through(
    soft: Float[Array, "b h p n"], is_open: Bool[Array, "b h p n"], hard: Hard
) -> Float[Array, "b h p n"]:
    """Value `(1 - hard) soft + hard open`, gradient of `soft`.

    The textbook form `soft + hard * stop(open - soft)` rounds to 1 +- ulp at `hard = 1`; here the
    last term is exactly 0, so the binary value is exact.
    """
    value = (1.0 - hard) * soft + hard * is_open.astype(soft.dtype)
    return lax.stop_gradient(value) + (soft - lax.stop_gradient(soft))


def relative_position(lengths: Lengths, n: int) -> Float[Array, "b n"]:
    """Position of each frame in its utterance, `u_i = i / (n_valid - 1)`, float32.

    The last valid frame is at 1, padding lies beyond it, and `n_valid = 1` gives `u_0 = 0`. Ours.
    """
    last = jnp.maximum(lengths.astype(jnp.float32) - 1.0, 1.0)
    return _frames(n) / last[:, None]


def log_spaced_periods(num_heads: int, num_pulses: int, max_period: float) -> np.ndarray:
    """Periods `[h p]` in frames, float32, log-spaced from 2 to `max_period` over all pulses (ours).

    Neighbouring periods go to different heads, so that every head covers the whole range.
    """
    periods = np.geomspace(MIN_PERIOD, max_period, num_heads * num_pulses)
    return periods.reshape(num_pulses, num_heads).T.astype(np.float32)


# ---------------------------------------------------------------------------------- rectangles


def rectangle_bounds(
    center: Float[Array, "b h p"], width: Float[Array, "b h p"], lengths: Lengths
) -> tuple[Int[Array, "b h p"], Int[Array, "b h p"]]:
    """First open frame and one past the last, int32: the frames that are open at `hard=True`."""
    limit = lengths.astype(jnp.int32)[:, None, None]
    start = jnp.ceil(center - width / 2).astype(jnp.int32)
    end = jnp.floor(center + width / 2).astype(jnp.int32) + 1
    start = jnp.clip(start, 0, limit)
    return start, jnp.clip(end, start, limit)


def rectangle_gates(
    center: Float[Array, "b h p"],
    width: Float[Array, "b h p"],
    mask: Mask,
    tau: Scalar | float,
    hard: Hard = 0.0,
) -> Gates:
    """Rectangle, `g_i = m_i sigmoid((i - start) / tau) sigmoid((end - i) / tau)`. Ours.

    `start, end = center -/+ width / 2`; `center`, `width` and `tau` are in frames. The binary gate
    is open where `start <= i <= end`.
    """
    i = _frames(mask.shape[-1])
    start = (center - width / 2)[..., None]
    end = (center + width / 2)[..., None]
    is_open = (i >= start) & (i <= end) & mask[:, None, None, :]
    if hard is True:
        return is_open
    soft = jax.nn.sigmoid((i - start) / tau) * jax.nn.sigmoid((end - i) / tau)
    return _straight_through(jnp.where(mask[:, None, None, :], soft, 0.0), is_open, hard)


def rectangle_gates_reference(center, width, mask, tau, hard=0.0) -> np.ndarray:
    """`rectangle_gates` in float64 loops."""
    center, width, mask = np.asarray(center), np.asarray(width), np.asarray(mask)
    b, h, p = np.shape(center)
    n = np.shape(mask)[1]
    gates = np.zeros((b, h, p, n))
    for bi, hi, pi, i in np.ndindex(b, h, p, n):
        start = float(center[bi, hi, pi]) - float(width[bi, hi, pi]) / 2
        end = float(center[bi, hi, pi]) + float(width[bi, hi, pi]) / 2
        if mask[bi, i]:
            soft = _sigmoid((i - start) / tau) * _sigmoid((end - i) / tau)
            gates[bi, hi, pi, i] = (1 - hard) * soft + hard * (start <= i <= end)
    return gates


# ----------------------------------------------------------------------------------------- runs


def run_gates(
    logit: Float[Array, "b h p n"], mask: Mask, tau: Scalar | float, hard: Hard = 0.0
) -> Gates:
    """Gate of the run form, `g_i = m_i sigmoid(logit_i / tau)`; binary: open where `logit_i > 0`.

    A pulse is a run of open gates. `tau` has the logit's unit. Ours.
    """
    valid = mask[:, None, None, :]
    # Cleared before the sigmoid as well as after: a NaN on padding would reach the gradient.
    logit = jnp.where(valid, logit.astype(jnp.float32), 0.0)
    if hard is True:
        return logit > 0
    soft = jnp.where(valid, jax.nn.sigmoid(logit / tau), 0.0)
    return _straight_through(soft, logit > 0, hard)


def run_gates_reference(logit, mask, tau, hard=0.0) -> np.ndarray:
    """`run_gates` in float64 loops."""
    logit, mask = np.asarray(logit), np.asarray(mask)
    b, h, p, n = np.shape(logit)
    gates = np.zeros((b, h, p, n))
    for bi, hi, pi, i in np.ndindex(b, h, p, n):
        if mask[bi, i]:
            z = float(logit[bi, hi, pi, i])
            gates[bi, hi, pi, i] = (1 - hard) * _sigmoid(z / tau) + hard * (z > 0)
    return gates


# ------------------------------------------------------------------------------------- periodic


def periodic_gates(
    period: Float[Array, "h p"] | np.ndarray,
    phase: Float[Array, "h p"],
    duty: Float[Array, "h p"],
    mask: Mask,
    tau: Scalar | float,
    hard: Hard = 0.0,
) -> Gates:
    """Periodic window. Ours.

    `g_i = m_i sigmoid((cos 2 pi (i / T - phase) - cos(pi duty)) / tau)`: `period` T in frames,
    `phase` in cycles, `duty` the open share in [0, 1], `tau` without unit. The binary gate is open
    within `duty / 2` cycles of a peak, where the soft one is above 1/2.
    """
    T = jnp.asarray(period, jnp.float32)[..., None]
    # The remainder is exact in float32; i / T at i = 6000 and T = 2 would be off by 1e-4 cycles.
    i = jnp.broadcast_to(_frames(mask.shape[-1]), (*T.shape[:-1], mask.shape[-1]))
    cycles = lax.rem(i, jnp.broadcast_to(T, i.shape)) / T - phase[..., None]
    valid = mask[:, None, None, :]
    is_open = (jnp.abs(cycles - jnp.round(cycles)) < duty[..., None] / 2) & valid
    if hard is True:
        return is_open
    level = jnp.cos(math.pi * duty)[..., None]
    soft = jax.nn.sigmoid((jnp.cos(2 * math.pi * cycles) - level) / tau)
    return _straight_through(jnp.where(valid, soft, 0.0), is_open, hard)


def periodic_gates_reference(period, phase, duty, mask, tau, hard=0.0) -> np.ndarray:
    """`periodic_gates` in float64 loops."""
    h, p = np.shape(period)
    b, n = np.shape(mask)
    gates = np.zeros((b, h, p, n))
    for bi, hi, pi, i in np.ndindex(b, h, p, n):
        if mask[bi, i]:
            angle = 2 * math.pi * (i / float(period[hi, pi]) - float(phase[hi, pi]))
            z = math.cos(angle) - math.cos(math.pi * float(duty[hi, pi]))
            gates[bi, hi, pi, i] = (1 - hard) * _sigmoid(z / tau) + hard * (z > 0)
    return gates


# ----------------------------------------------------------------------------------- positional


def positional_gates(
    alpha: Float[Array, "h p k"],
    beta: Float[Array, "h p"],
    lengths: Lengths,
    n: int,
    tau: Scalar | float,
    hard: Hard = 0.0,
) -> Gates:
    """Window over the position in the utterance. Ours.

    `g_i = m_i sigmoid((sum_k alpha_k cos(pi k u_i) + beta) / tau)`, `u` from `relative_position`.
    The binary gate is open where the series is positive.
    """
    order = jnp.arange(alpha.shape[-1], dtype=jnp.float32)
    basis = jnp.cos(math.pi * order * relative_position(lengths, n)[..., None])
    logit = jnp.einsum("hpk,bnk->bhpn", alpha, basis, precision=lax.Precision.HIGHEST)
    return run_gates(logit + beta[..., None], mask_from_lengths(lengths, n), tau, hard)


def positional_gates_reference(alpha, beta, lengths, n, tau, hard=0.0) -> np.ndarray:
    """`positional_gates` in float64 loops."""
    h, p, num_basis = np.shape(alpha)
    gates = np.zeros((len(lengths), h, p, n))
    for bi, hi, pi, i in np.ndindex(len(lengths), h, p, n):
        if i < lengths[bi]:
            u = i / (int(lengths[bi]) - 1) if lengths[bi] > 1 else 0.0
            series = (float(alpha[hi, pi, k]) * math.cos(math.pi * k * u) for k in range(num_basis))
            z = sum(series) + float(beta[hi, pi])
            gates[bi, hi, pi, i] = (1 - hard) * _sigmoid(z / tau) + hard * (z > 0)
    return gates


def _sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))
