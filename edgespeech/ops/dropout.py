"""Dropout with a counter-based hash for its random bits."""

import jax
import jax.numpy as jnp

from edgespeech.types import Array


def _mix(x: Array) -> Array:
    """A bijection of 32-bit integers that flips each output bit with probability near 1/2 for any flipped input bit.

    Two rounds of xor-shift and odd multiplication, the form and constants of C. Wellons' `lowbias32`.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes each element with probability `rate` and scales the others by `1 / (1 - rate)`.

    The bits are `mix(mix(index + seed_0) ^ seed_1)`, both seeds drawn from the key. `jax.random.bernoulli` would take
    two thirds of a training step of the tiny preset on a CPU (2.3 M elements: 18.6 ms against 3.4 ms, 2 cores,
    jax 0.10.2); dropout needs no more than bits without visible structure.

    Args:
        x: any floating array.
        rate: in [0, 1).
        key: a JAX random key; None returns x as it is.
    """
    if key is None or rate == 0.0:
        return x
    seed = jax.random.bits(key, (2,), jnp.uint32)
    index = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
    bits = _mix(_mix(index + seed[0]) ^ seed[1])
    keep = bits >= jnp.uint32(rate * 2.0**32)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
