"""Functions of arrays rewritten without what the converters for devices lack: loops, scatters, complex numbers.

The LiteRT converter cannot write what holds a program of its own, such as a loop or a scatter: a loop of known length
becomes its body once for each turn, and `x.at[:, i].add(row)` a masked sum. Neither format multiplies matrices with
more than three batch axes: they become one. Core ML's programs have no complex numbers and no padding between elements,
and gathers whose batch axes are not in front become loops there: a transform of a real array becomes two products,
the padding a concatenation, and the axes are moved.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from edgespeech.errors import InputError
from edgespeech.types import Array, Float

# Of a matrix product in LiteRT and Core ML, whose arrays have at most 5 axes there.
_MOST_BATCH_AXES = 3
# Primitives that run a program once, and the name under which they hold it.
_CALLS = {
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


class Spectrum(NamedTuple):
    """A complex array in two parts."""

    real: Array
    imag: Array


def unrolled(function: Callable[..., Any], *, coreml: bool = False) -> Callable[..., Any]:
    """The same function of arrays without calls, loops of known length and the rest of what no converter writes.

    Args:
        function: traceable by JAX, returns an array or a sequence of arrays.
        coreml: rewrite also what Core ML has not: transforms of real arrays,
            `rfft(x)_k = sum_j x_j cos(2 pi j k / n) - i sum_j x_j sin(2 pi j k / n)`, gathers, and padding.

    Raises:
        InputError: when it is traced for Core ML, if it has another transform, or a spectrum meets something else
            than `.real` and `.imag`.
    """

    def call(*arrays):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arrays)
        results = _evaluate(closed.jaxpr, closed.consts, arrays, coreml)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return call


def real_transform(x: Float[Array, "... n"], n: int) -> Spectrum:
    """`rfft` along the last axis, of length n, as matrix products with `[n, n/2+1]`."""
    # The remainder keeps the angle exact where j k is large.
    angle = 2 * np.pi * (np.outer(np.arange(n), np.arange(n // 2 + 1)) % n) / n
    return Spectrum(x @ jnp.float32(np.cos(angle)), x @ jnp.float32(-np.sin(angle)))


def _evaluate(
    jaxpr: Any, constants: Iterable[Any], arguments: Iterable[Any], coreml: bool
) -> list[Any]:
    """The values of a jaxpr's outputs."""
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if hasattr(variable, "val") else values[variable]

    for equation in jaxpr.eqns:
        results = _apply(equation, [read(v) for v in equation.invars], coreml)
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(equation: Any, operands: list[Any], coreml: bool) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _unroll(params, operands, coreml)
    if name in _CALLS:
        called = params[_CALLS[name]]  # of a checkpoint without constants
        inner, constants = getattr(called, "jaxpr", called), getattr(called, "consts", ())
        return _evaluate(inner, constants, operands, coreml)
    if name == "scatter-add" and _adds_one_row(equation):
        return [_add_row(*operands, axis=params["dimension_numbers"].inserted_window_dims[0])]
    if name == "dot_general" and len(params["dimension_numbers"][1][0]) > _MOST_BATCH_AXES:
        return [_flat_product(operands[0], operands[1], params)]
    if name == "gather" and coreml and _takes_along_an_axis(params["dimension_numbers"]):
        return [_batch_first_gather(operands[0], operands[1], params)]
    if name == "pad" and coreml:
        return [_pad(operands[0], operands[1], params["padding_config"])]
    if name == "fft" and coreml:
        kind, lengths = params["fft_type"], params["fft_lengths"]
        if kind != lax.FftType.RFFT or len(lengths) != 1:
            raise InputError(f"a transform of kind {kind.name} over {len(lengths)} axes: no rule")
        return [real_transform(operands[0], lengths[0])]
    if any(isinstance(operand, Spectrum) for operand in operands):
        if name not in Spectrum._fields:
            raise InputError(f"{name!r} of a complex array has no rule: use its .real and .imag")
        return [getattr(operands[0], name)]
    found = equation.primitive.bind(*operands, **params)
    return found if equation.primitive.multiple_results else [found]


def _adds_one_row(equation: Any) -> bool:
    """Whether a scatter adds one slice at one index of one axis."""
    numbers, (x, index, row) = equation.params["dimension_numbers"], equation.invars
    axes = numbers.scatter_dims_to_operand_dims
    return (
        len(axes) == 1
        and axes == numbers.inserted_window_dims
        and not numbers.operand_batching_dims
        and index.aval.shape == (1,)
        and row.aval.shape == (*x.aval.shape[: axes[0]], *x.aval.shape[axes[0] + 1 :])
    )


def _add_row(x: Array, index: Array, row: Array, axis: int) -> Array:
    """`x` with the row added at an index of an axis; one outside adds nothing."""
    here = lax.expand_dims(
        jnp.arange(x.shape[axis]) == index, [i for i in range(x.ndim) if i != axis]
    )
    return x + jnp.where(here, lax.expand_dims(row, (axis,)), 0)


def _pad(x: Array, value: Array, config: Sequence[tuple[int, int, int]]) -> Array:
    """`lax.pad`, what comes between elements by concatenation."""
    for axis, (_, _, between) in enumerate(config):
        n = x.shape[axis]
        if between and n > 1:
            shape = (*x.shape[: axis + 1], between, *x.shape[axis + 1 :])
            filled = [lax.expand_dims(x, [axis + 1]), lax.broadcast(value, shape)]
            whole = (*x.shape[:axis], n * (between + 1), *x.shape[axis + 1 :])
            x = lax.concatenate(filled, axis + 1).reshape(whole)
            x = lax.slice_in_dim(x, 0, n * (between + 1) - between, axis=axis)
    return lax.pad(x, value, [(low, high, 0) for low, high, _ in config])


def _flat_product(a: Array, b: Array, params: dict[str, Any]) -> Array:
    """A product of matrices with all batch axes in one."""
    contract, batch = params["dimension_numbers"]
    shape = tuple(a.shape[i] for i in batch[0])
    flat, axes, free = [], [], []
    for x, contracted, batched in zip((a, b), contract, batch, strict=True):
        rest = [i for i in range(x.ndim) if i not in batched]
        x = x.transpose(*batched, *rest)
        flat.append(x.reshape(math.prod(shape), *x.shape[len(batched) :]))
        axes.append(tuple(1 + rest.index(i) for i in contracted))
        free += [n for i, n in enumerate(flat[-1].shape) if i > 0 and i not in axes[-1]]
    y = lax.dot_general(
        flat[0],
        flat[1],
        (tuple(axes), ((0,), (0,))),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    return y.reshape(*shape, *free)


def _takes_along_an_axis(numbers: Any) -> bool:
    """Whether a gather takes whole slices at indices of one axis, other for each row of some batch axes."""
    batch, axes = numbers.operand_batching_dims, numbers.start_index_map
    return (
        len(batch) > 0
        and numbers.start_indices_batching_dims == tuple(range(len(batch)))
        and len(axes) == 1
        and numbers.collapsed_slice_dims == axes
    )


def _batch_first_gather(x: Array, index: Array, params: dict[str, Any]) -> Array:
    """The same gather with the batch axes of x in front, then the axis of the indices."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    batch, axes = numbers.operand_batching_dims, numbers.start_index_map
    rest = tuple(i for i in range(x.ndim) if i not in (*batch, *axes))
    front, k = index.ndim - 1, len(batch)
    new = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(front, front + len(rest))),
        collapsed_slice_dims=(k,),
        start_index_map=(k,),
        operand_batching_dims=tuple(range(k)),
        start_indices_batching_dims=tuple(range(k)),
    )
    order = (*batch, *axes, *rest)
    y = lax.gather(
        x.transpose(order),
        index,
        new,
        tuple(sizes[i] for i in order),
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"],
        mode=params["mode"],
        fill_value=params["fill_value"],
    )
    indices, offsets = iter(range(front)), iter(range(front, y.ndim))
    return y.transpose(
        [next(offsets) if i in numbers.offset_dims else next(indices) for i in range(y.ndim)]
    )


def _unroll(params: dict[str, Any], operands: list[Any], coreml: bool) -> list[Any]:
    """A scan, its body once for each turn."""
    body, length = params["jaxpr"], params["length"]
    start, stop = params["num_consts"], params["num_consts"] + params["num_carry"]
    fixed, carry, rows = operands[:start], operands[start:stop], operands[stop:]
    turns = []
    for turn in range(length)[:: -1 if params["reverse"] else 1]:
        now = [lax.index_in_dim(row, turn, keepdims=False) for row in rows]
        found = _evaluate(body.jaxpr, body.consts, [*fixed, *carry, *now], coreml)
        carry = found[: len(carry)]
        turns.append(found[len(carry) :])
    if params["reverse"]:
        turns.reverse()
    return [*carry, *(jnp.stack(parts) for parts in zip(*turns, strict=True))]
