"""Edit distances against the table cell by cell, and known ones."""

import jax
import numpy as np

from edgespeech.ops.edit_distance import edit_distance, edit_distance_reference

distance = jax.jit(edit_distance)


def test_random_sequences_of_all_lengths():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, size=(60, 9)), rng.integers(0, 4, size=(60, 7))
    n, m = rng.integers(0, 10, size=60), rng.integers(0, 8, size=60)
    n[:3], m[:3] = (0, 9, 0), (7, 0, 0)
    want = [edit_distance_reference(x[:i], y[:j]) for x, y, i, j in zip(a, b, n, m, strict=True)]
    np.testing.assert_array_equal(distance(a, n, b, m), want)
    np.testing.assert_array_equal(distance(b, m, a, n), want)
    assert len(set(want)) > 5


def test_known_distances():
    def letters(*words):
        rows = np.zeros((len(words), 8), np.int32)
        for row, word in zip(rows, words, strict=True):
            row[: len(word)] = [ord(letter) for letter in word]
        return rows, np.array([len(word) for word in words])

    a, n = letters("kitten", "abc", "", "same")
    b, m = letters("sitting", "", "abcd", "same")
    np.testing.assert_array_equal(distance(a, n, b, m), [3, 3, 4, 0])
    assert edit_distance_reference(a[0, : n[0]], b[0, : m[0]]) == 3
