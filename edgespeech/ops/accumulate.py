"""Pulse accumulation: the mean of the values inside each pulse, and its broadcast back to frames.

    A_p = sum_i g_pi v_i / (sum_i g_pi + eps)        y_i = sum_p alpha_p g_pi A_p

Source of the idea: LPA (arXiv 2603.16922), "averages what is inside"; the equations are ours.
Shapes: gates `[b h p n]` (float, or boolean where they are binary), values `[b h n c]`. All sums
are float32. Values on padding must be finite; gates are 0 there, so they do not count.
"""

from enum import Enum
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from edgespeech.errors import InputError
from edgespeech.types import Array, Bool, Float, Int

EPS = 1e-6
_BLOCK = 256


class AccumulateMethod(Enum):
    """How a sum over frames is computed; all agree to float rounding where they apply."""

    AUTO = "auto"
    SCAN = "scan"  # any gates; the state is one sum per pulse
    PREFIX = "prefix"  # binary gates: differences of one prefix sum shared by all pulses
    MATMUL = "matmul"  # gate matrix times values (runs: binary gates, O(n^2) memory)


class RunState(NamedTuple):
    """State of a causal average: what each pulse has gathered so far, float32."""

    total: Float[Array, "b h p c"]
    count: Float[Array, "b h p"]


# ------------------------------------------------------------------- pulses: one mean per pulse


def pulse_average(
    gates: Float[Array, "b h p n"] | Bool[Array, "b h p n"],
    values: Float[Array, "b h n c"],
    method: AccumulateMethod = AccumulateMethod.AUTO,
    bounds: tuple[Int[Array, "b h p"], Int[Array, "b h p"]] | None = None,
) -> Float[Array, "b h p c"]:
    """Mean of the values inside each pulse, `A_p = sum_i g_pi v_i / (sum_i g_pi + eps)`, float32.

    `bounds`, first frame and one past the last from `pulse.rectangle_bounds`, are what PREFIX sums
    by: it computes `(S[end] - S[start]) / (end - start + eps)` with S the prefix sum of the values,
    right only where the gates are those binary rectangles.

    Raises:
        InputError: PREFIX without `bounds`.
    """
    # AUTO takes MATMUL. Forward and forward + backward in ms, 2 CPU cores, jax 0.10.2, 2026-11-20,
    # at (b, h, p, n, c) = (16, 4, 16, 75, 48) and (1, 12, 16, 1500, 64):
    #   MATMUL 0.13 / 0.15 and 0.27 / 0.99; SCAN 0.32 / 0.59 and 0.74 / 1.84;
    #   PREFIX 0.58 / 0.83 and 2.81 / 3.04.
    if method in (AccumulateMethod.AUTO, AccumulateMethod.MATMUL):
        return _average_matmul(gates, values)
    if method is AccumulateMethod.SCAN:
        return _average_scan(gates, values)
    if bounds is None:
        raise InputError(
            "pulse_average got method=PREFIX and bounds=None: the prefix form is for binary "
            "rectangles only; pass bounds=rectangle_bounds(...) or choose MATMUL."
        )
    return _average_prefix(*bounds, values)


def _average_matmul(gates, values):
    gates = gates.astype(jnp.float32)
    total = jnp.einsum(
        "bhpn,bhnc->bhpc", gates, values.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    return total / (gates.sum(-1) + EPS)[..., None]


def _average_scan(gates, values):
    b, h, p, n = gates.shape
    c = values.shape[-1]
    num_blocks = -(-n // _BLOCK)
    pad = num_blocks * _BLOCK - n
    gates = jnp.pad(gates.astype(jnp.float32), ((0, 0), (0, 0), (0, 0), (0, pad)))
    values = jnp.pad(values.astype(jnp.float32), ((0, 0), (0, 0), (0, pad), (0, 0)))
    gate_blocks = jnp.moveaxis(gates.reshape(b, h, p, num_blocks, _BLOCK), 3, 0)
    value_blocks = jnp.moveaxis(values.reshape(b, h, num_blocks, _BLOCK, c), 2, 0)

    def step(state, block):
        g, v = block
        gathered = jnp.einsum("bhpn,bhnc->bhpc", g, v, precision=lax.Precision.HIGHEST)
        return RunState(state.total + gathered, state.count + g.sum(-1)), None

    zero = RunState(jnp.zeros((b, h, p, c), jnp.float32), jnp.zeros((b, h, p), jnp.float32))
    state, _ = lax.scan(step, zero, (gate_blocks, value_blocks))
    return state_mean(state)


def _average_prefix(start, end, values):
    prefix, offset = _centered_prefix(values)
    count = (end - start).astype(jnp.float32)
    total = jnp.take_along_axis(prefix, end[..., None], axis=2)
    total = total - jnp.take_along_axis(prefix, start[..., None], axis=2)
    total = total + count[..., None] * offset
    # An empty pulse divides by eps alone; without the select, the two gradients of 1 / eps that
    # meet in one prefix entry would leave their rounding error there.
    return state_mean(RunState(jnp.where(count[..., None] > 0, total, 0.0), count))


def _centered_prefix(values):
    """Prefix sum `[b h n+1 c]` of the values less their mean, and that mean `[b h 1 c]`.

    A prefix sum of thousands of values with a common sign loses the digits that a short rectangle
    needs; around its mean it does not grow. Any constant gives the same total, hence no gradient.
    """
    values = values.astype(jnp.float32)
    offset = lax.stop_gradient(values.mean(axis=2, keepdims=True))
    prefix = jnp.cumsum(values - offset, axis=2)
    return jnp.pad(prefix, ((0, 0), (0, 0), (1, 0), (0, 0))), offset


def state_mean(state: RunState) -> Float[Array, "... c"]:
    """`total / (count + eps)`."""
    return state.total / (state.count + EPS)[..., None]


def pulse_average_reference(gates, values) -> np.ndarray:
    """`pulse_average` in float64 loops."""
    gates, values = np.asarray(gates, np.float64), np.asarray(values, np.float64)
    b, h, p, n = np.shape(gates)
    averages = np.zeros((b, h, p, np.shape(values)[-1]))
    for bi, hi, pi in np.ndindex(b, h, p):
        total, count = 0.0, 0.0
        for i in range(n):
            total = total + gates[bi, hi, pi, i] * values[bi, hi, i]
            count = count + gates[bi, hi, pi, i]
        averages[bi, hi, pi] = total / (count + EPS)
    return averages


def broadcast(
    gates: Float[Array, "b h p n"] | Bool[Array, "b h p n"],
    averages: Float[Array, "b h p c"],
    alpha: Float[Array, "h p"] | Float[Array, "b h p n"],
) -> Float[Array, "b h n c"]:
    """Every open frame receives its pulse's mean, `y_i = sum_p alpha_p g_pi A_p`, float32.

    `alpha` is one weight per pulse, or one per pulse and frame.
    """
    gates = gates.astype(jnp.float32)
    if alpha.ndim == gates.ndim:
        gates = gates * alpha
    else:
        averages = averages * alpha[..., None]
    return jnp.einsum("bhpn,bhpc->bhnc", gates, averages, precision=lax.Precision.HIGHEST)


def broadcast_reference(gates, averages, alpha) -> np.ndarray:
    """`broadcast` in float64 loops."""
    gates, averages, alpha = (np.asarray(a, np.float64) for a in (gates, averages, alpha))
    b, h, p, n = np.shape(gates)
    alpha = np.broadcast_to(alpha if np.ndim(alpha) == 4 else alpha[None, :, :, None], gates.shape)
    out = np.zeros((b, h, n, np.shape(averages)[-1]))
    for bi, hi, pi, i in np.ndindex(b, h, p, n):
        out[bi, hi, i] += alpha[bi, hi, pi, i] * gates[bi, hi, pi, i] * averages[bi, hi, pi]
    return out


# ------------------------------------------------------------- runs: one mean per run of gates


def run_average(
    gates: Float[Array, "b h p n"] | Bool[Array, "b h p n"],
    values: Float[Array, "b h n c"],
    method: AccumulateMethod = AccumulateMethod.AUTO,
    causal: bool = False,
) -> Float[Array, "b h p n c"]:
    """Mean of the run of open gates around each frame (`causal`: of the run so far), float32. Ours.

    Forward `s_i = g_i (s_{i-1} + v_i)`, so a closed gate resets; backward the same from the right.
    Forward + backward - `g_i v_i` is the total of the whole run. The same with v = 1 is the count,
    and the result is `total / (count + eps)`. Soft gates leak between runs. `gates` must be boolean
    for PREFIX and MATMUL; the state of the causal form is O(1) in n (`run_average_step`).

    Raises:
        InputError: PREFIX or MATMUL with float gates.
    """
    is_binary = gates.dtype == jnp.bool_
    if method is AccumulateMethod.AUTO:
        # In ms as in pulse_average: PREFIX 0.98 / 18 and 22 / 88, SCAN 30 / 56 and 154 / 400,
        # MATMUL 14 / 32 at the first shape; at the second its matrix would take 1.7 GB.
        method = AccumulateMethod.PREFIX if is_binary else AccumulateMethod.SCAN
    if method is AccumulateMethod.SCAN:
        return _run_scan(gates, values, causal)
    if not is_binary:
        raise InputError(
            f"run_average got method={method.name} and gates of {gates.dtype}: this form needs "
            "boolean gates; pass run_gates(..., hard=True) or choose SCAN."
        )
    if method is AccumulateMethod.PREFIX:
        return _run_prefix(gates, values, causal)
    return _run_matmul(gates, values, causal)


def _run_scan(gates, values, causal):
    a = gates.astype(jnp.float32)[..., None]
    gated = gated_with_count(gates, values)
    total = linear_recurrence(a, gated)
    if not causal:
        total = total + linear_recurrence(a, gated, reverse=True) - gated
    return state_mean(RunState(total[..., :-1], total[..., -1]))


def gated_with_count(
    gates: Float[Array, "b h p n"] | Bool[Array, "b h p n"], values: Float[Array, "b h n c"]
) -> Float[Array, "b h p n c+1"]:
    """`g_i v_i` with one channel more, `g_i`, so that sums and counts ride in the same scan; float32."""
    ones = jnp.ones((*values.shape[:-1], 1), jnp.float32)
    with_ones = jnp.concatenate([values.astype(jnp.float32), ones], -1)
    return gates.astype(jnp.float32)[..., None] * with_ones[:, :, None]


def linear_recurrence(
    a: Float[Array, "b h p n 1"], x: Float[Array, "b h p n c"], reverse: bool = False
) -> Float[Array, "b h p n c"]:
    """`s_i = a_i s_{i-1} + x_i` over the frames, by an associative scan of the pairs (a, s)."""

    def compose(left, right):
        (a1, s1), (a2, s2) = left, right
        return a1 * a2, a2 * s1 + s2

    return lax.associative_scan(compose, (a, x), axis=3, reverse=reverse)[1]


def _run_prefix(gates, values, causal):
    n = gates.shape[-1]
    index = jnp.arange(n, dtype=jnp.int32)
    start = lax.cummax(jnp.where(gates, 0, index + 1), axis=3)
    end = index + 1 if causal else lax.cummin(jnp.where(gates, n, index), axis=3, reverse=True)
    end = jnp.where(gates, end, start)  # a closed gate has an empty run
    b, h, p, _ = gates.shape
    flat = _average_prefix(start.reshape(b, h, p * n), end.reshape(b, h, p * n), values)
    return flat.reshape(b, h, p, n, -1)


def _run_matmul(gates, values, causal):
    run = jnp.cumsum(~gates, axis=3)
    same = (run[..., :, None] == run[..., None, :]) & gates[..., :, None] & gates[..., None, :]
    if causal:
        same = jnp.tril(same)
    same = same.astype(jnp.float32)
    total = jnp.einsum(
        "bhpij,bhjc->bhpic", same, values.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    return state_mean(RunState(total, same.sum(-1)))


def run_average_init(b: int, h: int, p: int, c: int) -> RunState:
    """State before the first frame: no open run."""
    return RunState(jnp.zeros((b, h, p, c), jnp.float32), jnp.zeros((b, h, p), jnp.float32))


def run_average_step(
    state: RunState,
    gate: Float[Array, "b h p"] | Bool[Array, "b h p"],
    value: Float[Array, "b h c"],
    decay: Float[Array, "b h p"] | None = None,
) -> tuple[RunState, Float[Array, "b h p c"]]:
    """One frame of `run_average(causal=True)`: the new state and the mean of the run so far.

    `decay`, what is kept of the past (None: the gate), makes it a frame of `causal_accumulate`.
    """
    g = gate.astype(jnp.float32)
    a = g if decay is None else decay
    total = a[..., None] * state.total + g[..., None] * value.astype(jnp.float32)[:, :, None]
    state = RunState(total, a * state.count + g)
    return state, state_mean(state)


def run_average_reference(gates, values, causal=False) -> np.ndarray:
    """`run_average` in float64 loops: every frame weighs the product of the gates up to it."""
    gates, values = np.asarray(gates, np.float64), np.asarray(values, np.float64)
    b, h, p, n = np.shape(gates)
    means = np.zeros((b, h, p, n, np.shape(values)[-1]))
    for bi, hi, pi, i in np.ndindex(b, h, p, n):
        total, count = 0.0, 0.0
        for direction in (range(i, -1, -1), range(i, n)):
            weight = 1.0
            for j in direction:
                weight *= gates[bi, hi, pi, j]
                if weight == 0.0 or (j > i and causal):
                    break
                if j != i or direction.step < 0:
                    total = total + weight * values[bi, hi, j]
                    count = count + weight
        means[bi, hi, pi, i] = total / (count + EPS)
    return means


def run_broadcast(
    gates: Float[Array, "b h p n"] | Bool[Array, "b h p n"],
    averages: Float[Array, "b h p n c"],
    alpha: Float[Array, "h p"] | Float[Array, "b h p n"],
) -> Float[Array, "b h n c"]:
    """Every open frame receives its run's mean, `y_i = sum_p alpha_p g_pi A_pi`, float32."""
    weight = gates.astype(jnp.float32) * (alpha if alpha.ndim == gates.ndim else alpha[..., None])
    return jnp.einsum("bhpn,bhpnc->bhnc", weight, averages, precision=lax.Precision.HIGHEST)
