"""The linear part of an LPA, fitted in closed form to the attention whose place it takes.

An LPA's output is linear in its readout alpha and in the taps kappa of its local path, one row of taps a head:

    f(theta) = f(0) + J theta,    theta = (alpha_hp, kappa_hk)
    theta*   = argmin sum_i |y_i - f_i(0) - J_i theta|^2 + ridge |theta|^2

y is what the attention gives, after the output projection. Value and output projections are the attention's, so this
fits the map `sum_p alpha_p g_pi g_pj / sum_j g_pj + kappa_(j-i)` of each head to the attention's own maps, weighted by
the values that they meet; nothing is trained yet. All of it is ours.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree

from edgespeech.nn.lpa import LPA
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Float, Frames, Lengths

# Of the mean square of a column: columns that differ by little share what they explain.
RIDGE = 1e-3


def fit_linear_part(lpa: LPA, x: Frames, y: Frames, lengths: Lengths) -> None:
    """Sets readout and local path, in place, to what comes closest to y at the LPA's present gates.

    Args:
        lpa: with the attention's value and output projections; its local path gets the same taps in all channels of a
            head, and scale 1.
        x: `[b n d]`, inputs of the attention.
        y: `[b n d]`, its outputs.
        lengths: `[b]`, valid frames; rows of length 0 count nowhere.
    """
    part = _linear_part(lpa)
    if not part:
        return
    flat, unravel = ravel_pytree(part)
    graphdef, state = nnx.split(lpa)
    # One row at a time: a column is as large as the output, and there are some hundred of them.
    gram, target = np.zeros((flat.size, flat.size)), np.zeros(flat.size)
    for row in range(len(x)):
        piece = (a[row : row + 1] for a in (x, y, lengths))
        products = _normal_equations(graphdef, state, *piece)
        gram, target = gram + np.float64(products[0]), target + np.float64(products[1])
    ridge = max(RIDGE * gram.trace() / len(gram), np.finfo(np.float32).tiny)
    solution = np.linalg.solve(gram + ridge * np.eye(len(gram)), target)
    _set_linear_part(lpa, unravel(jnp.asarray(solution, jnp.float32)))


@functools.partial(jax.jit, static_argnums=0)
def _normal_equations(
    graphdef: nnx.GraphDef, state: nnx.State, x: Frames, y: Frames, lengths: Lengths
) -> tuple[Float[Array, "m m"], Float[Array, "m"]]:
    """`J^T J` and `J^T (y - f(0))` of one utterance."""
    mask = mask_from_lengths(lengths, x.shape[1])
    flat, unravel = ravel_pytree(_linear_part(nnx.merge(graphdef, state)))

    def output(theta):
        lpa = nnx.merge(graphdef, state, copy=True)
        _set_linear_part(lpa, unravel(theta))
        return zero_padding(lpa(x, lengths), mask).reshape(-1)

    base = output(jnp.zeros_like(flat))
    columns = jax.vmap(output)(jnp.eye(flat.size)) - base
    return columns @ columns.T, columns @ (zero_padding(y, mask).reshape(-1) - base)


def _linear_part(lpa: LPA) -> dict[str, Float[Array, "..."]]:
    part: dict[str, Any] = {}
    if lpa.config.num_pulses:
        part["alpha"] = lpa.alpha[...]
    if lpa.config.local:
        part["taps"] = jnp.zeros((lpa.config.local_kernel_size, lpa.num_heads))
    return part


def _set_linear_part(lpa: LPA, part: dict[str, Float[Array, "..."]]) -> None:
    if "alpha" in part:
        lpa.alpha[...] = part["alpha"].astype(lpa.alpha.dtype)
    if "taps" in part:
        width = lpa.local_kernel.shape[1] // lpa.num_heads
        taps = jnp.repeat(part["taps"], width, axis=1)
        lpa.local_kernel[...] = taps.astype(lpa.local_kernel.dtype)
        lpa.local_scale[...] = jnp.ones_like(lpa.local_scale[...])
