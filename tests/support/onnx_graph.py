"""Runs the graph of an `.ort` file in NumPy: the operations of Moonshine's two graphs, from ONNX's definitions."""

import math

import numpy as np

TYPES = {1: np.float32, 7: np.int64, 9: np.bool_}
ERF = np.vectorize(math.erf)


def conv(a, x, kernel, bias=None):
    """`[b d n], [e d k] -> [b e m]`; the graphs have no padding, dilation or groups."""
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2], axis=2)
    y = np.einsum("bdnk,edk->ben", windows[:, :, :: a["strides"][0]], kernel, optimize=True)
    return y if bias is None else y + bias[:, None]


def instance_norm(a, x, scale, bias):
    centred = x - x.mean(2, keepdims=True)
    variance = (centred**2).mean(2, keepdims=True)
    return centred / np.sqrt(variance + a["epsilon"]) * scale[:, None] + bias[:, None]


def cut(a, x, starts, ends, axes=None, steps=None):
    index = [slice(None)] * x.ndim
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(int(start), int(end), int(step))
    return x[tuple(index)]


def reshape(a, x, shape):
    return x.reshape([x.shape[i] if s == 0 else s for i, s in enumerate(shape)])


def unsqueeze(a, x, axes):
    return np.expand_dims(x, tuple(int(i) for i in axes))


def softmax(a, x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reduce_mean(a, x):
    return x.mean(tuple(a["axes"]), keepdims=bool(a["keepdims"]))


def trilu(a, x, k):
    return np.triu(x, int(k)) if a["upper"] else np.tril(x, int(k))


OPERATIONS = {
    "Add": lambda a, x, y: x + y,
    "Cast": lambda a, x: x.astype(TYPES[a["to"]]),
    "Concat": lambda a, *xs: np.concatenate(xs, a["axis"]),
    "ConstantOfShape": lambda a, shape: np.full(shape, a["value"][0]),
    "Conv": conv,
    "Cos": lambda a, x: np.cos(x),
    "Div": lambda a, x, y: x / y,
    "Equal": lambda a, x, y: x == y,
    "Erf": lambda a, x: ERF(x).astype(x.dtype),
    "Expand": lambda a, x, shape: x * np.ones(shape, x.dtype),
    "Gather": lambda a, x, i: np.take(x, i, axis=a["axis"]),
    "Greater": lambda a, x, y: x > y,
    "InstanceNormalization": instance_norm,
    "MatMul": lambda a, x, y: x @ y,
    "Mul": lambda a, x, y: x * y,
    "Neg": lambda a, x: -x,
    "Pow": lambda a, x, y: x**y,
    "Range": lambda a, start, stop, step: np.arange(start, stop, step),
    "ReduceMean": reduce_mean,
    "Reshape": reshape,
    "Shape": lambda a, x: np.array(x.shape),
    "Sigmoid": lambda a, x: 1 / (1 + np.exp(-x)),
    "Sin": lambda a, x: np.sin(x),
    "Slice": cut,
    "Softmax": softmax,
    "Sqrt": lambda a, x: np.sqrt(x),
    "Sub": lambda a, x, y: x - y,
    "Tanh": lambda a, x: np.tanh(x),
    "Transpose": lambda a, x: x.transpose(a.get("perm")),
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
    "Where": lambda a, condition, x, y: np.where(condition, x, y),
}


def run_graph(graph, **inputs):
    """The outputs of a graph by name; of `If` its condition's branch, which sees the values around it."""
    values = {**inputs, **graph.initializers}
    for node in graph.nodes:
        if node.op_type == "If":
            branch = "then_branch" if values[node.inputs[0]].all() else "else_branch"
            branch = node.attributes[branch]
            outputs = run_graph(branch, **values).values()
            values.update(zip(node.outputs, outputs, strict=True))
        else:
            operands = [values[name] if name else None for name in node.inputs]
            values[node.outputs[0]] = OPERATIONS[node.op_type](node.attributes, *operands)
    return {name: values[name] for name in graph.outputs}
