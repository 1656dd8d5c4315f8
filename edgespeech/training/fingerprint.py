"""A number for the bits of an array, the same on the devices and on the host, to find out damage on the way."""

import jax
import jax.numpy as jnp
import numpy as np

from edgespeech.types import Array

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@jax.jit
def fingerprint(arrays: list[Array]) -> list[Array]:
    """uint32 of every array, of elements of up to 4 bytes.

        f = sum_i (2 i + 1) bits(x_i)   mod 2^32

    A change of one element changes it, since its weight is odd. Zeros after the end do not. An array may be cut over
    the devices in any way: integers add up the same in any order. Ours.
    """
    return [_weighted_sum(array) for array in arrays]


def _weighted_sum(array: Array) -> Array:
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array.ravel(), _UNSIGNED[array.dtype.itemsize])
    weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
    return jnp.sum(bits.astype(jnp.uint32) * weights, dtype=jnp.uint32)


def fingerprint_of_array(array: np.ndarray) -> int:
    """The same of an array on the host."""
    array = np.ascontiguousarray(array).ravel()
    bits = array.view(_UNSIGNED[array.dtype.itemsize]).astype(np.uint32)
    weights = 2 * np.arange(bits.size, dtype=np.uint32) + np.uint32(1)
    return int(np.sum(bits * weights, dtype=np.uint32))
