"""How JAX's element-wise primitives, and those that move elements, become ONNX nodes.

A rule is `(graph, equation's parameters, operands, outputs' shapes and dtypes) -> values`.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from edgespeech.errors import InputError
from edgespeech.interop.onnx_graph import Graph, Value, constant, integers

Aval: TypeAlias = Any  # has shape and dtype
Rule: TypeAlias = Callable[[Graph, dict[str, Any], Sequence[Value], Aval], Value]

# Primitives that are one element-wise node.
NODES = {
    "abs": "Abs",
    "add": "Add",
    "add_any": "Add",
    "ceil": "Ceil",
    "cos": "Cos",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tanh": "Tanh",
}
LOGICAL = {"and": "And", "or": "Or", "not": "Not"}
SMALL = 4096  # elements up to which a table is worth storing rather than computing
IDENTITIES = ("copy", "copy_p", "optimization_barrier", "stop_gradient")


def elementwise(graph: Graph, op: str, operands: Sequence[Value], dtype: Any, **more) -> Value:
    """A node whose operands broadcast against each other."""
    stored = np.broadcast_shapes(*(value.stored for value in operands))
    shape = np.broadcast_shapes(*(value.shape for value in operands))
    return graph.emit(op, operands, shape, dtype, stored, **more)


def _like(value: Value, number: float) -> Value:
    return constant(np.asarray(number, value.dtype))


def _node(op: str) -> Rule:
    return lambda graph, params, operands, out: elementwise(graph, op, operands, out.dtype)


def _logical(op: str) -> Rule:
    def rule(graph, params, operands, out):
        if out.dtype != np.bool_:
            raise InputError(f"ONNX export: {op} of integers has no rule; use booleans")
        return elementwise(graph, op, operands, out.dtype)

    return rule


def _not_equal(graph, params, operands, out):
    equal = elementwise(graph, "Equal", operands, np.bool_)
    return elementwise(graph, "Not", [equal], np.bool_)


def _rsqrt(graph, params, operands, out):
    root = elementwise(graph, "Sqrt", operands, out.dtype)
    return elementwise(graph, "Reciprocal", [root], out.dtype)


def _square(graph, params, operands, out):
    return elementwise(graph, "Mul", [operands[0], operands[0]], out.dtype)


def _exp2(graph, params, operands, out):
    (x,) = operands
    return elementwise(graph, "Pow", [_like(x, 2), x], out.dtype)


def _integer_pow(graph, params, operands, out):
    (x,) = operands
    if params["y"] == 2:
        return _square(graph, params, operands, out)
    return elementwise(graph, "Pow", [x, _like(x, params["y"])], out.dtype)


def _erfc(graph, params, operands, out):
    erf = elementwise(graph, "Erf", operands, out.dtype)
    return elementwise(graph, "Sub", [_like(erf, 1), erf], out.dtype)


def _round(graph, params, operands, out):
    if int(params["rounding_method"]) != 1:
        raise InputError("ONNX export: rounding half away from zero has no rule; use jnp.round")
    return elementwise(graph, "Round", operands, out.dtype)


def _rem(graph, params, operands, out):
    return elementwise(graph, "Mod", operands, out.dtype, fmod=1)


def _clamp(graph, params, operands, out):
    low, x, high = operands
    x = elementwise(graph, "Max", [x, low], out.dtype)
    return elementwise(graph, "Min", [x, high], out.dtype)


def _select(graph, params, operands, out):
    which, *cases = operands
    if which.dtype != np.bool_ or len(cases) != 2:
        raise InputError("ONNX export: a select by an integer has no rule; use jnp.where")
    no, yes = cases
    if out.dtype != np.bool_:
        return elementwise(graph, "Where", [which, yes, no], out.dtype)
    other = elementwise(graph, "Not", [which], out.dtype)
    parts = [elementwise(graph, "And", pair, out.dtype) for pair in ([which, yes], [other, no])]
    return elementwise(graph, "Or", parts, out.dtype)


def _cast(graph, params, operands, out):
    (x,) = operands
    if x.dtype == out.dtype:
        return x
    return elementwise(graph, "Cast", operands, out.dtype, to=graph.element_type(out.dtype))


# ------------------------------------------------------------------------------------------- shapes


def _broadcast(graph, params, operands, out):
    x = operands[0]
    stored = [1] * len(out.shape)
    for axis, place in enumerate(params["broadcast_dimensions"]):
        stored[place] = x.stored[axis]
    # x itself may be an unfinished broadcast: only what is stored changes its shape.
    kept = Value(x.stored, x.dtype, x.stored, x.array, x.name)
    kept = graph.reshape(kept, stored)
    return Value(tuple(out.shape), kept.dtype, tuple(stored), kept.array, kept.name)


def _reshape(graph, params, operands, out):
    return graph.reshape(operands[0], out.shape)


def _transpose(graph, params, operands, out):
    return graph.transpose(operands[0], params["permutation"])


def _slice(graph, params, operands, out):
    return graph.slice(
        operands[0], params["start_indices"], params["limit_indices"], params["strides"]
    )


def _dynamic_slice(graph, params, operands, out):
    x, *starts = operands
    if any(start.array is None for start in starts):
        raise InputError("ONNX export: a slice whose start is computed has no rule")
    sizes = params["slice_sizes"]
    first = [
        int(np.clip(start.array, 0, x.shape[axis] - sizes[axis]))
        for axis, start in enumerate(starts)
    ]
    return graph.slice(x, first, [a + size for a, size in zip(first, sizes, strict=True)])


def _rev(graph, params, operands, out):
    x = graph.full(operands[0])
    axes = params["dimensions"]
    backwards = [integers([number] * len(axes)) for number in (-1, -(2**31))]
    steps = integers([-1] * len(axes))
    return graph.emit("Slice", [x, *backwards, integers(axes), steps], out.shape, out.dtype)


def _pad(graph, params, operands, out):
    x, fill = operands
    edges = params["padding_config"]
    for axis, (_, _, inner) in enumerate(edges):
        x = _spread(graph, x, axis, inner, fill)
    # Negative padding cuts.
    starts = [max(0, -low) for low, _, _ in edges]
    stops = [size + min(0, high) for size, (_, high, _) in zip(x.shape, edges, strict=True)]
    x = graph.slice(x, starts, stops)
    pads = [max(0, low) for low, _, _ in edges] + [max(0, high) for _, high, _ in edges]
    if not any(pads):
        return x
    return graph.emit("Pad", [x, integers(pads), fill], out.shape, out.dtype)


def _spread(graph: Graph, x: Value, axis: int, inner: int, fill: Value) -> Value:
    """Puts `inner` elements between every two neighbours along an axis."""
    n, rank = x.shape[axis], len(x.shape)
    if not inner or n < 2:
        return x
    columns = [*x.shape[: axis + 1], 1, *x.shape[axis + 1 :]]
    pads = [0] * (2 * rank + 2)
    pads[rank + 1 + axis + 1] = inner  # after the element, along the new axis
    operands = [graph.reshape(x, columns), integers(pads), fill]
    columns[axis + 1] += inner
    x = graph.emit("Pad", operands, columns, x.dtype)
    stops = [*columns[:axis], n * (1 + inner), *columns[axis + 2 :]]
    x = graph.reshape(x, stops)
    stops[axis] -= inner
    return graph.slice(x, [0] * rank, stops)


def concatenate(graph: Graph, parts: Sequence[Value], axis: int) -> Value:
    """Values side by side."""
    if len(parts) == 1:
        return parts[0]
    parts = [graph.full(part) for part in parts]
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return graph.emit("Concat", parts, shape, parts[0].dtype, axis=axis)


def _stack(graph, params, operands, out):
    axis = params["axis"]
    shape = [1 if place == axis else size for place, size in enumerate(out.shape)]
    return concatenate(graph, [graph.reshape(part, shape) for part in operands], axis)


def _iota(graph, params, operands, out):
    axis = params["dimension"]
    size = out.shape[axis]
    stored = [1] * len(out.shape)
    stored[axis] = size
    if size <= SMALL:
        array = np.arange(size, dtype=out.dtype).reshape(stored)
        return Value(tuple(out.shape), array.dtype, tuple(stored), array)
    ends = [constant(np.asarray(number, out.dtype)) for number in (0, size, 1)]
    numbers = graph.reshape(graph.emit("Range", ends, [size], out.dtype), stored)
    return Value(tuple(out.shape), numbers.dtype, tuple(stored), name=numbers.name)


def _gather(graph, params, operands, out):
    """One index for each place, into one axis of x, which may have batch axes in common with the index."""
    x, index = (graph.full(value) for value in operands)
    numbers, axes = params["dimension_numbers"], params["dimension_numbers"].start_index_map
    batch, index_batch = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    rest = [i for i in range(len(x.shape)) if i not in (*batch, *axes)]
    sizes = [size if i in rest else 1 for i, size in enumerate(x.shape)]
    if (
        len(axes) != 1
        or numbers.collapsed_slice_dims != axes
        or list(params["slice_sizes"]) != sizes
    ):
        raise InputError("ONNX export: a gather along more than one axis has no rule; use jnp.take")
    (axis,) = axes
    index = _inside(graph, index, x.shape[axis])
    places = range(len(index.shape) - 1)  # the last axis holds the one coordinate
    if batch:
        others = [i for i in places if i not in index_batch]
        x = graph.transpose(x, (*batch, axis, *rest))
        index = graph.transpose(index, (*index_batch, *others, len(places)))
        found_axes = [("index", i) for i in (*index_batch, *others)] + [("x", i) for i in rest]
        op, more = "GatherND", {"batch_dims": len(batch)}
    else:
        index = graph.reshape(index, index.shape[:-1])
        found_axes: list[tuple[str, int]] = [("x", i) for i in rest]
        found_axes[axis:axis] = [("index", i) for i in places]
        op, more = "Gather", {"axis": axis}
    from_x, from_index = (("x", i) for i in rest), (("index", i) for i in places)
    wanted = [
        next(from_x) if place in numbers.offset_dims else next(from_index)
        for place in range(len(out.shape))
    ]
    size_of = dict(zip(wanted, out.shape, strict=True))
    found = graph.emit(op, [x, index], [size_of[a] for a in found_axes], out.dtype, **more)
    return graph.transpose(found, [found_axes.index(a) for a in wanted])


def _inside(graph: Graph, index: Value, size: int) -> Value:
    """Indices as int64; one out of range, whose result JAX leaves to a mode, becomes the nearest one inside."""
    if index.array is not None:
        table = np.clip(index.array, 0, size - 1).astype(np.int64)
        if table.ndim == 3 and table.size > SMALL:
            # The windows of a spectrogram: a start plus a place in the window.
            start, place = table[:, :1], table[:1] - table[:1, :1]
            if (start + place == table).all():
                return elementwise(graph, "Add", [constant(start), constant(place)], np.int64)
        return constant(table)
    index = _clamp(graph, {}, [_like(index, 0), index, _like(index, size - 1)], index)
    return _cast(graph, {}, [index], np.empty(0, np.int64))


RULES: dict[str, Rule] = {
    **{name: _node(op) for name, op in NODES.items()},
    **{name: _logical(op) for name, op in LOGICAL.items()},
    **dict.fromkeys(IDENTITIES, lambda graph, params, operands, out: operands[0]),
    "broadcast_in_dim": _broadcast,
    "clamp": _clamp,
    "concatenate": lambda graph, params, operands, out: concatenate(
        graph, operands, params["dimension"]
    ),
    "convert_element_type": _cast,
    "dynamic_slice": _dynamic_slice,
    "erfc": _erfc,
    "exp2": _exp2,
    "expand_dims": _reshape,
    "gather": _gather,
    "integer_pow": _integer_pow,
    "iota": _iota,
    "ne": _not_equal,
    "pad": _pad,
    "rem": _rem,
    "reshape": _reshape,
    "rev": _rev,
    "round": _round,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "slice": _slice,
    "square": _square,
    "squeeze": _reshape,
    "stack": _stack,
    "transpose": _transpose,
}
