"""Masks of valid positions."""

import jax.numpy as jnp

from edgespeech.types import Array, Frames, Lengths, Mask


def mask_from_lengths(lengths: Lengths, n: int) -> Mask:
    """Returns `[b n]` with True at the positions below each length."""
    return jnp.arange(n)[None, :] < lengths[:, None]


def zero_padding(x: Frames, mask: Mask) -> Frames:
    """Returns x with zeros where the mask is False.

    A select, not a product: NaN in the padding must not survive, and `NaN * 0` is NaN.
    """
    return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))


def masked_mean(x: Array, mask: Array, axis: int | tuple[int, ...]) -> Array:
    """Mean of the valid values in float32, `sum(mask x) / max(sum(mask), 1)`, axes kept.

    Args:
        x: any floating array.
        mask: boolean, broadcastable to x.
        axis: axes to reduce; they stay with size 1.
    """
    mask = jnp.broadcast_to(mask, x.shape)
    total = jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0.0), axis=axis, keepdims=True)
    count = jnp.sum(mask, axis=axis, keepdims=True, dtype=jnp.float32)
    return total / jnp.maximum(count, 1.0)
