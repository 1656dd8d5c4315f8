"""The number for the bits: equal on device and host, and different after damage."""

import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.training.fingerprint import fingerprint, fingerprint_of_array

ARRAYS = [
    np.asarray(7, np.int32),
    np.linspace(-3, 3, 1000, dtype=np.float32),
    np.asarray([[np.nan, np.inf], [-0.0, 1e-45]], np.float32),
    np.asarray([True, False, True]),
    np.arange(6, dtype=np.uint8).reshape(2, 3),
    np.linspace(-1, 1, 9).astype(jnp.bfloat16),
    np.zeros(0, np.float32),
]


def plain(array):
    size = array.dtype.itemsize
    data = np.ascontiguousarray(array).tobytes()
    bits = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
    return sum((2 * i + 1) * b for i, b in enumerate(bits)) % 2**32


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_is_the_weighted_sum_of_the_bits(array):
    assert int(fingerprint([jnp.asarray(array)])[0]) == plain(array)
    assert fingerprint_of_array(array) == plain(array)


def test_sees_one_flipped_bit_and_two_swapped_elements_and_not_zeros_at_the_end():
    array = ARRAYS[1]
    whole = fingerprint_of_array(array)
    for bit in (0, 31):
        damaged = array.copy()
        damaged.view(np.uint32)[500] ^= np.uint32(1 << bit)
        assert fingerprint_of_array(damaged) != whole
    swapped = array.copy()
    swapped[[3, 700]] = swapped[[700, 3]]
    assert fingerprint_of_array(swapped) != whole
    assert fingerprint_of_array(np.append(array, np.zeros(24, np.float32))) == whole
