"""Averages over windows at fixed distances around every frame, weighted by what the frame asks for (ours).

Frame t parts all others by where they are as seen from it: single frames up to `taps` away, then windows that double in
length with their distance, `octaves` of them to each side, then all that is further away. It scores the windows, and
every frame has a score of its own, whoever looks:

    y_t = sum_j w_tj v_j / sum_j w_tj,      w_tj = exp(s_t,k(j-t) + r_j),      k(j - t) the window that frame j lies in

This is softmax attention whose logits are a sum of two: one of the query and, in steps of an octave, of the distance,
and one of the key. The sums over windows are differences of one prefix sum, so it is linear in the number of frames.
"""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np

from edgespeech.errors import InputError
from edgespeech.ops.mask import masked_mean, zero_padding
from edgespeech.types import Array, Float, Int, Mask

FAR = 1 << 30  # no recording has so many frames
TINY = 1e-30


def window_spans(taps: int, octaves: int) -> Int[np.ndarray, "k 2"]:
    """First and last distance of every window, `k = 2 taps + 1 + 2 (octaves + 1)`, in the order of the scores.

    The single frames from -taps to taps; the windows after the frame, nearest first, the last one to the end; the same
    before it.

    Raises:
        InputError: a number is negative.
    """
    if taps < 0 or octaves < 0:
        raise InputError(f"{taps} taps and {octaves} octaves: neither may be negative")
    single = np.arange(-taps, taps + 1)
    starts = _starts(taps, octaves)
    after = np.stack([starts, np.append(starts[1:] - 1, FAR)], 1)
    return np.concatenate([np.stack([single, single], 1), after, -after[:, ::-1]])


def relative_average_reference(
    values, scores, salience, mask, taps: int, octaves: int
) -> np.ndarray:
    """`relative_average` by the n x n weights of the equation, in float64."""
    values, scores, salience = (np.asarray(a, np.float64) for a in (values, scores, salience))
    y = np.zeros(values.shape)
    spans = window_spans(taps, octaves)
    for b, t in np.argwhere(mask):
        logits = np.full(scores.shape[2:3] + values.shape[1:2], -np.inf)  # [h n]
        for j in np.flatnonzero(mask[b]):
            (window,) = np.flatnonzero((spans[:, 0] <= j - t) & (j - t <= spans[:, 1]))
            logits[:, j] = scores[b, t, :, window] + salience[b, j]
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        y[b, t] = np.einsum("hj,jhc->hc", weights, np.where(mask[b][:, None, None], values[b], 0))
    return y


def relative_average(
    values: Float[Array, "b n h c"],
    scores: Float[Array, "b n h k"],
    salience: Float[Array, "b n h"],
    mask: Mask,
    taps: int,
    octaves: int,
) -> Float[Array, "b n h c"]:
    """What every frame gathers from its windows, float32; on padding it is finite and has no meaning.

    Args:
        values: v; on padding anything.
        scores: s, one for every window of `window_spans`.
        salience: r, at most some tens: its exponential is summed up; on padding anything.
        mask: True where a frame is valid.
        taps: see `window_spans`.
        octaves: see `window_spans`.
    """
    b, n, h, c = values.shape
    values = zero_padding(values.reshape(b, n, h * c).astype(jnp.float32), mask)
    # Weights sum to 1, so the mean may go and come back; without it the prefix sum does not grow with the length.
    mean = masked_mean(values, mask[..., None], axis=1)
    importance = jnp.exp(zero_padding(salience.astype(jnp.float32), mask))
    importance = zero_padding(importance, mask)[..., None]
    values = (values - mean).reshape(b, n, h, c) * importance
    weight = _window_sums(importance, taps, octaves)  # [b n h k]
    scores = jnp.where(weight > 0, scores.astype(jnp.float32), -FAR)
    query = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    query = query / jnp.maximum(jnp.sum(query * weight, axis=-1, keepdims=True), TINY)
    return mean.reshape(b, 1, h, c) + _gather(query, values, taps, octaves)


def _window_sums(x: Float[Array, "b n h 1"], taps: int, octaves: int) -> Float[Array, "b n h k"]:
    """`sum_(j in window k of t) x_j` for every window, of values that are not negative.

    A window far shorter than what was summed before it may come out slightly off; one without a frame is exactly 0.
    """
    starts = _starts(taps, octaves)
    zero, prefix = jnp.zeros_like(x[:, :1]), jnp.cumsum(x, axis=1)
    total = prefix[:, -1:]
    single = [_shifted(x, offset, zero) for offset in range(-taps, taps + 1)]
    edges = [_shifted(prefix, start - 1, total) for start in starts.tolist()]
    after = [far - near for near, far in pairwise([*edges, total])]
    edges = [_shifted(prefix, -start, zero) for start in starts.tolist()]
    before = [near - far for near, far in pairwise([*edges, zero])]
    return jnp.concatenate([*single, *after, *before], axis=-1)


def _gather(weights: Array, values: Float[Array, "b n h c"], taps: int, octaves: int) -> Array:
    """`sum_k w_k sum_(j in window k) v_j`, weights `[... k]` that broadcast against `[b n h]`.

    With S the prefix sum, a window that starts at distance a, and the next one at a', sums to S[t+a'-1] - S[t+a-1]
    after the frame and to S[t-a] - S[t-a'] before it; neighbours share an S, with the difference of their weights.
    """
    starts = _starts(taps, octaves)
    single, after, before = jnp.split(weights, [2 * taps + 1, 2 * taps + 1 + len(starts)], axis=-1)
    y = jnp.zeros((), values.dtype)
    for k, offset in enumerate(range(-taps, taps + 1)):
        y = y + single[..., k, None] * _shifted(values, offset, jnp.zeros_like(values[:, :1]))
    prefix = jnp.cumsum(values, axis=1)
    total, nothing = prefix[:, -1:], jnp.zeros_like(prefix[:, :1])
    for k, start in enumerate(starts.tolist()):
        left = 0.0 if k == 0 else after[..., k - 1, None]
        y = y + (left - after[..., k, None]) * _shifted(prefix, start - 1, total)
        left = 0.0 if k == 0 else before[..., k - 1, None]
        y = y + (before[..., k, None] - left) * _shifted(prefix, -start, nothing)
    return y + after[..., -1, None] * total


def _starts(taps: int, octaves: int) -> np.ndarray:
    return (taps + 1) * 2 ** np.arange(octaves + 1)


def _shifted(x: Float[Array, "b n h c"], offset: int, outside: Float[Array, "b 1 h c"]) -> Array:
    """`x[t + offset]`, and `outside` where there is no such frame."""
    b, n, h, c = x.shape
    missing = min(abs(offset), n)
    fill = jnp.broadcast_to(outside, (b, missing, h, c))
    if offset >= 0:
        return jnp.concatenate([x[:, missing:], fill], axis=1)
    return jnp.concatenate([fill, x[:, : n - missing]], axis=1)
