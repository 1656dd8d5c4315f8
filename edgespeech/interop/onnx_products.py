"""How JAX's reductions, matrix products, convolutions and Fourier transform become ONNX nodes."""

import math
from collections.abc import Sequence

import numpy as np
from jax import lax

from edgespeech.errors import InputError
from edgespeech.interop.onnx_graph import Graph, Value, constant, integers
from edgespeech.interop.onnx_ops import Rule, concatenate, elementwise

REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


def _reduction(op: str) -> Rule:
    def rule(graph, params, operands, out):
        x = graph.full(operands[0])
        return graph.emit(op, [x, integers(params["axes"])], out.shape, out.dtype, keepdims=0)

    return rule


def _logical_reduction(op: str) -> Rule:
    def rule(graph, params, operands, out):
        x = graph.full(operands[0])
        number = graph.emit("Cast", [x], x.shape, np.int32, to=graph.element_type(np.int32))
        axes = integers(params["axes"])
        found = graph.emit(op, [number, axes], out.shape, np.int32, keepdims=0)
        return graph.emit("Cast", [found], out.shape, out.dtype, to=graph.element_type(out.dtype))

    return rule


def _argmax(graph, params, operands, out):
    (axis,) = params["axes"]
    x = graph.full(operands[0])
    index = graph.emit("ArgMax", [x], out.shape, np.int64, axis=axis, keepdims=0)
    return graph.emit("Cast", [index], out.shape, out.dtype, to=graph.element_type(out.dtype))


def _cumsum(graph, params, operands, out):
    x = graph.full(operands[0])
    axis = constant(np.int64(params["axis"]))
    return graph.emit("CumSum", [x, axis], out.shape, out.dtype, reverse=int(params["reverse"]))


def _scatter_add(graph, params, operands, out):
    """A sum into one block of x whose place is known: `x.at[:, 0].add(update)`."""
    x, index, update = operands
    numbers = params["dimension_numbers"]
    if index.array is None or len(index.shape) != 1 or numbers.operand_batching_dims:
        raise InputError(
            "ONNX export: sums into places that are computed, or several, have no rule"
        )
    block = list(update.shape)
    for axis in sorted(numbers.inserted_window_dims):
        block.insert(axis, 1)
    before = [0] * len(block)
    places = np.broadcast_to(index.array, index.shape)
    for axis, place in zip(numbers.scatter_dims_to_operand_dims, places.tolist(), strict=True):
        before[axis] = place
    after = [n - i - size for n, i, size in zip(out.shape, before, block, strict=True)]
    if min(*before, *after) < 0:
        raise InputError(f"ONNX export: a sum at {before}, outside of {list(out.shape)}")
    pads = integers([*before, *after])
    zero = constant(np.zeros((), out.dtype))
    update = graph.emit("Pad", [graph.reshape(update, block), pads, zero], out.shape, out.dtype)
    return elementwise(graph, "Add", [x, update], out.dtype)


def _running(op: str) -> Rule:
    """Running maximum or minimum, which ONNX lacks: by shifts of 1, 2, 4, ... frames."""

    def rule(graph, params, operands, out):
        (x,), axis = operands, params["axis"]
        n, shift = x.shape[axis], 1
        info = np.finfo(x.dtype) if x.dtype.kind == "f" else np.iinfo(x.dtype)
        while shift < n:
            starts, stops = [0] * len(x.shape), list(x.shape)
            if params["reverse"]:
                starts[axis] = shift
            else:
                stops[axis] = n - shift
            edge = list(x.shape)
            edge[axis] = shift
            neutral = info.min if op == "Max" else info.max
            parts = [constant(np.full(edge, neutral, x.dtype)), graph.slice(x, starts, stops)]
            moved = concatenate(graph, parts[::-1] if params["reverse"] else parts, axis)
            x = elementwise(graph, op, [x, moved], out.dtype)
            shift *= 2
        return x

    return rule


def _dot(graph, params, operands, out):
    a, b = (graph.full(value) for value in operands)
    (contract_a, contract_b), (batch_a, batch_b) = params["dimension_numbers"]
    rank = len(a.shape)
    if not batch_a and contract_a == (rank - 1,) and len(b.shape) == 2:
        # A linear layer: kept as it is, so that the weights stay a matrix that can be quantised by columns.
        weights = b if contract_b == (0,) else graph.transpose(b, (1, 0))
        return graph.emit("MatMul", [a, weights], out.shape, out.dtype)
    free_a = [i for i in range(rank) if i not in (*contract_a, *batch_a)]
    free_b = [i for i in range(len(b.shape)) if i not in (*contract_b, *batch_b)]
    batch = [a.shape[i] for i in batch_a]
    m, n = (math.prod(x.shape[i] for i in free) for x, free in ((a, free_a), (b, free_b)))
    k = math.prod(a.shape[i] for i in contract_a)
    a = graph.reshape(graph.transpose(a, (*batch_a, *free_a, *contract_a)), (*batch, m, k))
    b = graph.reshape(graph.transpose(b, (*batch_b, *contract_b, *free_b)), (*batch, k, n))
    product = graph.emit("MatMul", [a, b], (*batch, m, n), out.dtype)
    return graph.reshape(product, out.shape)


def _conv(graph, params, operands, out):
    x, kernel = operands
    spec = params["dimension_numbers"]
    if any(d != 1 for d in params["lhs_dilation"]) or params["batch_group_count"] != 1:
        raise InputError("ONNX export: a transposed convolution has no rule")
    y = convolution(
        graph,
        graph.transpose(x, spec.lhs_spec),
        graph.transpose(kernel, spec.rhs_spec),
        [out.shape[axis] for axis in spec.out_spec],
        group=params["feature_group_count"],
        strides=params["window_strides"],
        dilations=params["rhs_dilation"],
        pads=[low for low, _ in params["padding"]] + [high for _, high in params["padding"]],
    )
    return graph.transpose(y, np.argsort(spec.out_spec).tolist())


def convolution(graph: Graph, x: Value, kernel: Value, shape: Sequence[int], **attributes) -> Value:
    """`Conv` of x `[b channels ...]` and a kernel `[out in/group ...]`."""
    return graph.emit("Conv", [graph.full(x), graph.full(kernel)], shape, x.dtype, **attributes)


def shifted_sum(graph: Graph, x: Value, kernel: Value) -> Value:
    """`ops.conv._shifted_sum`, `[b n+k-1 d], [k d] -> [b n d]`, as the depthwise convolution that it is.

    Its k products and sums would be as many nodes each, and int8 weights want a kernel.
    """
    (b, padded, d), k = x.shape, kernel.shape[0]
    x = graph.transpose(x, (0, 2, 1))
    kernel = graph.reshape(graph.transpose(kernel, (1, 0)), (d, 1, k))
    y = convolution(graph, x, kernel, (b, d, padded - k + 1), group=d)
    return graph.transpose(y, (0, 2, 1))


def _fft(graph, params, operands, out):
    """The transform of real signals along the last axis."""
    if params["fft_type"] != lax.FftType.RFFT or len(params["fft_lengths"]) != 1:
        raise InputError("ONNX export: of Fourier transforms, jnp.fft.rfft of one axis has a rule")
    (length,) = params["fft_lengths"]
    x = graph.full(operands[0])
    x = graph.reshape(x, (*x.shape, 1))
    operands = [x, constant(np.int64(length)), constant(np.int64(len(out.shape) - 1))]
    stored = (*out.shape, 2)
    return graph.emit("DFT", operands, out.shape, out.dtype, stored, onesided=1)


def _part(index: int) -> Rule:
    """Real or imaginary part."""

    def rule(graph, params, operands, out):
        operands = [operands[0], constant(np.int64(index))]
        return graph.emit("Gather", operands, out.shape, out.dtype, axis=len(out.shape))

    return rule


RULES: dict[str, Rule] = {
    **{name: _reduction(op) for name, op in REDUCTIONS.items()},
    "argmax": _argmax,
    "conv_general_dilated": _conv,
    "cummax": _running("Max"),
    "cummin": _running("Min"),
    "cumsum": _cumsum,
    "dot_general": _dot,
    "fft": _fft,
    "imag": _part(1),
    "real": _part(0),
    "reduce_and": _logical_reduction("ReduceMin"),
    "reduce_or": _logical_reduction("ReduceMax"),
    "scatter-add": _scatter_add,
}
