"""Rotary positions (Su et al., "RoFormer", arXiv 2104.09864, section 3.2)."""

import jax.numpy as jnp

from edgespeech.types import Array, Float, Int


def rotate(
    x: Float[Array, "b n h c"], positions: Int[Array, "n"], width: int, base: float = 10_000.0
) -> Float[Array, "b n h c"]:
    """Turns each of the first `width / 2` pairs of channels by an angle that grows with the position.

        y_{2i} + j y_{2i+1} = (x_{2i} + j x_{2i+1}) exp(j position base^(-2i / width)),   i < width / 2

    so that the product of a query and a key depends on the distance of their positions. Channels from `width` on pass
    unchanged ("partial" rotary). Neighbouring channels are a pair, as in the paper and in Moonshine; other models pair
    channel i with channel i + width / 2.

    Args:
        x: queries or keys; angles are in float32, the result has x's dtype.
        positions: counted from 0.
        width: rotated channels of a head, even.
        base: of the geometric series of frequencies.
    """
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    even, odd = x[..., 0:width:2], x[..., 1:width:2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    turned = turned.reshape(*x.shape[:-1], width).astype(x.dtype)
    return jnp.concatenate([turned, x[..., width:]], axis=-1)
