"""Edit distance of label sequences (Levenshtein, 1966), batched and on the device."""

import jax
import jax.numpy as jnp
import numpy as np

from edgespeech.types import Array, Int, Lengths


def edit_distance_reference(a: np.ndarray, b: np.ndarray) -> int:
    """`edit_distance` of two sequences of any lengths, cell by cell.

    D_ij = min(D_{i-1,j} + 1, D_{i,j-1} + 1, D_{i-1,j-1} + [a_i != b_j])
    """
    distance = np.zeros((len(a) + 1, len(b) + 1), int)
    distance[:, 0], distance[0] = range(len(a) + 1), range(len(b) + 1)
    for i, left in enumerate(a, 1):
        for j, right in enumerate(b, 1):
            distance[i, j] = min(
                distance[i - 1, j] + 1,
                distance[i, j - 1] + 1,
                distance[i - 1, j - 1] + (left != right),
            )
    return int(distance[-1, -1])


def edit_distance(
    a: Int[Array, "b n"], a_lengths: Lengths, b: Int[Array, "b m"], b_lengths: Lengths
) -> Int[Array, "b"]:
    """Fewest insertions, deletions and substitutions that turn one sequence of each row into the other.

    A row of the table at a time, as many as the longest a has labels. The insertions along a row are a running minimum:
    `D_ij = min_{k<=j} (D'_ik + j - k)`, D' being the cells without them.

    Args:
        a: labels; what lies beyond a length has no part in it.
        a_lengths: `[b]`.
        b: labels.
        b_lengths: `[b]`.

    Returns:
        int32.
    """
    columns = jnp.arange(b.shape[1] + 1, dtype=jnp.int32)
    start = jnp.broadcast_to(columns, (len(b), len(columns)))

    def next_row(i, above):
        label = jax.lax.dynamic_slice_in_dim(a, i, 1, axis=1)
        cells = jnp.minimum(above[:, 1:] + 1, above[:, :-1] + (label != b))
        first = jnp.full((len(b), 1), i + 1, jnp.int32)
        cells = jnp.concatenate([first, cells], axis=1)
        cells = columns + jax.lax.cummin(cells - columns, axis=1)
        return jnp.where(i < a_lengths[:, None], cells, above)

    last = jax.lax.fori_loop(0, jnp.max(a_lengths), next_row, start)
    return jnp.take_along_axis(last, b_lengths[:, None], axis=1)[:, 0]
