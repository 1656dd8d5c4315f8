"""Causal accumulation: every frame receives the mean of what its open pulses have gathered so far.

    s_pi = a_pi s_p,i-1 + g_pi v_i        c_pi = a_pi c_p,i-1 + g_pi
    A_pi = s_pi / (c_pi + eps)            y_i  = sum_p alpha_p g_pi A_pi

The gate g says what a pulse takes of a frame, the decay a what it keeps of the past. Ours:

    run of open gates    a_i = g_i          a closed gate forgets the run
    decaying window      a_i = 2^(-1/H)     a frame counts half as much H frames later
    padding              a_i = 1, g_i = 0   the state stays as it is

Shapes: decay and gates `[b h p n]`, values `[b h n c]`. All sums are float32. Values on padding must
be finite.
"""

from enum import Enum

import jax.numpy as jnp
import numpy as np
from jax import lax

from edgespeech.ops.accumulate import (
    EPS,
    RunState,
    gated_with_count,
    linear_recurrence,
    run_average_step,
    run_broadcast,
    state_mean,
)
from edgespeech.types import Array, Bool, Float

_BLOCK = 16


class CausalMethod(Enum):
    """How the recurrence over frames is computed; all agree to float rounding."""

    AUTO = "auto"
    SCAN = "scan"  # associative scan: depth log n; the means of all pulses and frames in memory
    LOOP = "loop"  # frame after frame: least work, for the short chunks of a stream
    BLOCK = (
        "block"  # blocks of 16 frames, matrix products inside them, the state from one to the next
    )


def window_decay(log2_half_life: Float[Array, "..."]) -> Float[Array, "..."]:
    """`2^(-1/H)`, what a window of half-life H frames keeps from one frame to the next, from log2 H.

    Below 1 for H up to about 2^23; beyond that float32 rounds it to 1, a window that never forgets.
    """
    return jnp.exp2(-jnp.exp2(-log2_half_life))


def causal_accumulate(
    decay: Float[Array, "b h p n"],
    gates: Float[Array, "b h p n"] | Bool[Array, "b h p n"],
    values: Float[Array, "b h n c"],
    alpha: Float[Array, "h p"] | Float[Array, "b h p n"],
    state: RunState,
    method: CausalMethod = CausalMethod.AUTO,
) -> tuple[Float[Array, "b h n c"], RunState]:
    """What every frame receives, y, and the state after the last frame; float32.

    A sequence in chunks, each with the state that the one before returned, gives the same frames.

    Args:
        decay: a in [0, 1].
        gates: g in [0, 1].
        values: v.
        alpha: one weight per pulse, or one per pulse and frame.
        state: s and c before the first frame; `run_average_init` for a new stream.
        method: see `CausalMethod`.
    """
    # Forward and gradient in ms, least of 12 on 2 busy CPU cores, jax 0.10.2, 2026-11-20, at (b, h, p, n, c) =
    # (8, 4, 16, 400, 36) and (1, 4, 16, 16, 36): SCAN 224 / 2184 and 0.10 / 1.13, LOOP 133 / 313 and 0.08 / 0.18,
    # BLOCK 16 / 184 and 0.09 / 0.15; one frame: LOOP 0.04, BLOCK 0.07.
    if method is CausalMethod.AUTO:
        method = CausalMethod.LOOP if values.shape[2] <= _BLOCK else CausalMethod.BLOCK
    form = {
        CausalMethod.SCAN: _accumulate_scan,
        CausalMethod.LOOP: _accumulate_loop,
        CausalMethod.BLOCK: _accumulate_block,
    }[method]
    return form(decay.astype(jnp.float32), gates, values, alpha, state)


def _accumulate_scan(decay, gates, values, alpha, state):
    past = jnp.concatenate([state.total, state.count[..., None]], -1)
    a, x = decay[..., None], gated_with_count(gates, values)
    # What came before the first frame enters with it: a_0 s_{-1} + g_0 v_0.
    x = x.at[..., 0, :].add(a[..., 0, :] * past)
    s = linear_recurrence(a, x)
    states = RunState(s[..., :-1], s[..., -1])
    y = run_broadcast(gates, state_mean(states), alpha)
    return y, RunState(states.total[..., -1, :], states.count[..., -1])


def _accumulate_loop(decay, gates, values, alpha, state):
    frames = (jnp.moveaxis(gates, 3, 0), jnp.moveaxis(values, 2, 0), jnp.moveaxis(decay, 3, 0))
    state, means = lax.scan(lambda state, frame: run_average_step(state, *frame), state, frames)
    return run_broadcast(gates, jnp.moveaxis(means, 0, 3), alpha), state


def _accumulate_block(decay, gates, values, alpha, state):
    """With s the state before a block, inside it `s_i = D_i s + sum_j W_ij v_j`.

    W and D obey the recurrence themselves, `W_i = a_i W_i-1 + g_i e_i` and `D_i = a_i D_i-1`, in all
    blocks at once. Below, i and j are frames of a block and k counts blocks.
    """
    (b, h, p, n), c = gates.shape, values.shape[-1]
    num_blocks = -(-n // _BLOCK)
    pad = num_blocks * _BLOCK - n

    def blocks(x, fill=0.0):
        """`[b h p n] -> [i b h p k]`."""
        x = jnp.broadcast_to(x, gates.shape).astype(jnp.float32)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, pad)), constant_values=fill)
        return jnp.moveaxis(x.reshape(b, h, p, num_blocks, _BLOCK), 4, 0)

    def einsum(how, *arrays):
        return jnp.einsum(how, *arrays, precision=lax.Precision.HIGHEST)

    def next_frame(carry, frame):
        (W, D), (a, g, unit) = carry, frame
        W = a[..., None] * W + g[..., None] * unit
        return (W, a * D), (W, a * D)

    def next_block(state, block):
        kept, new = block
        total = kept[..., None] * state.total + new.total
        return RunState(total, kept * state.count + new.count), state

    g = blocks(gates)
    v = jnp.pad(values.astype(jnp.float32), ((0, 0), (0, 0), (0, pad), (0, 0)))
    v = v.reshape(b, h, num_blocks, _BLOCK, c)
    ones = jnp.ones((b, h, p, num_blocks))
    empty = jnp.zeros((b, h, p, num_blocks, _BLOCK))
    frames = blocks(decay, 1.0), g, jnp.eye(_BLOCK)
    _, (W, D) = lax.scan(next_frame, (empty, ones), frames)

    count = W.sum(-1)
    gathered = RunState(einsum("bhpkj,bhkjc->kbhpc", W[-1], v), jnp.moveaxis(count[-1], -1, 0))
    state, before = lax.scan(next_block, state, (jnp.moveaxis(D[-1], -1, 0), gathered))

    count = count + D * jnp.moveaxis(before.count, 0, -1)
    weight = blocks(alpha if alpha.ndim == 4 else alpha[..., None]) * g / (count + EPS)
    y = einsum("bhkij,bhkjc->bhkic", einsum("ibhpk,ibhpkj->bhkij", weight, W), v)
    y = y + einsum("ibhpk,kbhpc->bhkic", weight * D, before.total)
    return y.reshape(b, h, num_blocks * _BLOCK, c)[:, :, :n], state


def causal_accumulate_reference(
    decay, gates, values, alpha, state: RunState
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`causal_accumulate` in float64, one frame after another: y, and s and c after the last frame."""
    a, g, v, s, c = (np.asarray(x, np.float64) for x in (decay, gates, values, *state))
    alpha = np.asarray(alpha, np.float64)
    alpha = np.broadcast_to(alpha if alpha.ndim == 4 else alpha[None, :, :, None], g.shape)
    y = np.zeros_like(v)
    for i in range(v.shape[2]):
        s = a[..., i, None] * s + g[..., i, None] * v[:, :, None, i]
        c = a[..., i] * c + g[..., i]
        average = s / (c + EPS)[..., None]
        y[:, :, i] = np.sum((alpha * g)[..., i, None] * average, axis=2)
    return y, s, c
