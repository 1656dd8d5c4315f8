"""JAX functions as ONNX graphs: a walk over the jaxpr, one rule a primitive.

It covers what our encoders with a CTC head compute at inference, LPA with hard gates included. Shapes are fixed. What
depends on no input is computed here and becomes a constant: parameters in another layout, the weight-normalised kernel
of the positions, the gates' thresholds. Loops of known length are unrolled.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from edgespeech.errors import InputError
from edgespeech.interop import onnx_ops, onnx_products
from edgespeech.interop.onnx_graph import Graph, Value, constant
from edgespeech.interop.onnx_products import shifted_sum

RULES = onnx_ops.RULES | onnx_products.RULES
# Names under which a primitive holds the program that it calls.
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# A constant that is computed here may have so many elements more than what it is computed from.
_GROWTH = 4096
# Their rules keep a constant small, where JAX would spread it out.
_LAZY = ("broadcast_in_dim", "iota")


def to_onnx(
    function: Callable[..., Any],
    inputs: dict[str, jax.ShapeDtypeStruct],
    outputs: Sequence[str],
    about: str = "",
) -> Any:
    """The ONNX model (`onnx.ModelProto`) of a function of arrays.

    Args:
        function: traceable by JAX; returns one array a name of `outputs`. Arrays that it closes over become constants.
        inputs: shape and dtype of each argument, by the name that it gets in the graph, in order.
        outputs: names.
        about: goes into the graph as its description.

    Raises:
        InputError: the function uses a primitive that has no rule, or the package `onnx` is missing.
    """
    if importlib.util.find_spec("onnx") is None:
        raise InputError("ONNX export needs the package onnx: pip install 'edgespeech[export]'")
    closed = jax.make_jaxpr(function)(*inputs.values())
    graph = Graph()
    arguments = [graph.input(name, aval.shape, aval.dtype) for name, aval in inputs.items()]
    results = _walk(graph, closed.jaxpr, [constant(c) for c in closed.consts], arguments)
    if len(results) != len(outputs):
        raise InputError(f"the function returns {len(results)} arrays for {len(outputs)} names")
    return graph.model(arguments, list(zip(outputs, results, strict=True)), about)


def _walk(graph: Graph, jaxpr: Any, constants: Iterable[Value], arguments: Sequence[Value]):
    """The values of a jaxpr's outputs."""
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(variable) -> Value:
        if hasattr(variable, "val"):  # a literal, perhaps a Python number
            return constant(np.asarray(variable.val, variable.aval.dtype))
        return values[variable]

    for equation in jaxpr.eqns:
        results = _apply(graph, equation, [read(v) for v in equation.invars])
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(graph: Graph, equation: Any, operands: list[Value]) -> list[Value]:
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _unroll(graph, params, operands)
    called = next((params[key] for key in _CALLED if key in params), None)
    if called is not None and name not in ("while", "cond"):
        inner = getattr(called, "jaxpr", called)
        function = inner.debug_info.func_name if inner.debug_info else ""
        if name == "custom_vjp_call" and function == "_shifted_sum":
            return [shifted_sum(graph, *operands)]
        return _walk(graph, inner, map(constant, getattr(called, "consts", ())), operands)
    outs = [variable.aval for variable in equation.outvars]
    if name not in _LAZY and _is_constant(operands, outs):
        arrays = [jax.numpy.asarray(graph.full(value).array) for value in operands]
        found = equation.primitive.bind(*arrays, **params)
        found = found if equation.primitive.multiple_results else [found]
        return [constant(np.asarray(array)) for array in found]
    if name == "split":
        return _split(graph, params, operands[0])
    if name not in RULES:
        raise InputError(
            f"ONNX export: the primitive {name!r} has no rule; the model must do without it, or "
            "edgespeech/interop/onnx_ops.py needs one"
        )
    return [RULES[name](graph, params, operands, outs[0])]


def _is_constant(operands: Sequence[Value], outs: Sequence[Any]) -> bool:
    """Whether a result depends on no input and does not blow the file up."""
    if any(value.array is None for value in operands):
        return False
    before = sum(math.prod(value.stored) for value in operands)
    return sum(math.prod(out.shape) for out in outs) <= before + _GROWTH


def _unroll(graph: Graph, params: dict[str, Any], operands: list[Value]) -> list[Value]:
    """A scan, its body once for each turn."""
    closed, length = params["jaxpr"], params["length"]
    start, stop = params["num_consts"], params["num_consts"] + params["num_carry"]
    fixed, carry, rows = operands[:start], operands[start:stop], operands[stop:]
    turns: list[list[Value]] = []
    order = range(length - 1, -1, -1) if params["reverse"] else range(length)
    for turn in order:
        now = [_row(graph, value, turn) for value in rows]
        found = _walk(graph, closed.jaxpr, map(constant, closed.consts), [*fixed, *carry, *now])
        carry = found[: len(carry)]
        turns.append(found[len(carry) :])
    if params["reverse"]:
        turns.reverse()
    stacked = []
    for parts in zip(*turns, strict=True):
        parts = [graph.reshape(part, (1, *part.shape)) for part in parts]
        stacked.append(onnx_ops.concatenate(graph, parts, 0))
    return [*carry, *stacked]


def _row(graph: Graph, value: Value, index: int) -> Value:
    if value.array is not None:
        return constant(np.broadcast_to(value.array, value.shape)[index])
    shape = value.shape[1:]
    starts, stops = [index] + [0] * len(shape), [index + 1, *shape]
    return graph.reshape(graph.slice(value, starts, stops), shape)


def _split(graph: Graph, params: dict[str, Any], x: Value) -> list[Value]:
    axis, at, parts = params["axis"], 0, []
    for size in map(int, params["sizes"]):
        starts, stops = [0] * len(x.shape), list(x.shape)
        starts[axis], stops[axis] = at, at + size
        parts.append(graph.slice(x, starts, stops))
        at += size
    return parts
