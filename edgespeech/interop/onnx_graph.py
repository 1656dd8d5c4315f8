"""An ONNX graph under construction: values, constants, and nodes in order."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

OPSET = 20


@dataclass
class Value:
    """An array of the program: a constant, or the output of a node.

    A broadcast is put off: `stored` has 1 where `shape` may have more, which element-wise nodes spread by themselves.
    A complex array is stored as real and imaginary part along one more axis.

    Attributes:
        shape: in the program.
        dtype: in the program.
        stored: shape of what is there.
        array: of a constant, in the shape `stored`.
        name: in the graph; a constant has one once a node uses it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stored: tuple[int, ...]
    array: np.ndarray | None = None
    name: str | None = None


def constant(array: Any) -> Value:
    """A constant."""
    array = np.asarray(array)
    return Value(array.shape, array.dtype, array.shape, array)


def integers(values: Sequence[int]) -> Value:
    """A constant vector of int64, such as ONNX wants for shapes and axes."""
    return constant(np.asarray(values, np.int64).reshape(-1))


class Graph:
    """Nodes and initialisers, in the order in which they were made."""

    def __init__(self):
        self._onnx: Any = importlib.import_module("onnx")
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._names: dict[tuple, str] = {}  # of small constants, so that each is there once
        self._count = 0

    def input(self, name: str, shape: Sequence[int], dtype: Any) -> Value:
        """An input of the graph."""
        return Value(tuple(shape), np.dtype(dtype), tuple(shape), name=name)

    def emit(
        self,
        op: str,
        inputs: Sequence[Value],
        shape: Sequence[int],
        dtype: Any,
        stored: Sequence[int] | None = None,
        **attributes: Any,
    ) -> Value:
        """Adds a node of one output of this shape and dtype."""
        (value,) = self.emit_many(op, inputs, [(shape, dtype)], **attributes)
        value.stored = tuple(shape if stored is None else stored)
        return value

    def emit_many(
        self,
        op: str,
        inputs: Sequence[Value],
        outputs: Sequence[tuple[Sequence[int], Any]],
        **attributes: Any,
    ) -> list[Value]:
        """Adds a node of several outputs, each a shape and a dtype."""
        values = []
        for shape, dtype in outputs:
            self._count += 1
            name = f"v{self._count}"
            values.append(Value(tuple(shape), np.dtype(dtype), tuple(shape), name=name))
        names = [self.name_of(value) for value in inputs]
        node = self._onnx.helper.make_node(op, names, [v.name for v in values], **attributes)
        self.nodes.append(node)
        return values

    def name_of(self, value: Value) -> str:
        """The value's name; a constant becomes an initialiser."""
        if value.name is not None:
            return value.name
        array = value.array
        assert array is not None
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= 64 else None
        if key is None or key not in self._names:
            name = f"c{len(self.initializers)}"
            tensor = self._onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
            tensor.dims[:] = array.shape  # ascontiguousarray makes a vector of a scalar
            self.initializers.append(tensor)
            if key is not None:
                self._names[key] = name
        else:
            name = self._names[key]
        value.name = name
        return name

    def element_type(self, dtype: Any) -> int:
        """ONNX's number of a dtype."""
        return self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def full(self, value: Value) -> Value:
        """The value with its broadcast carried out."""
        if value.stored == value.shape or value.dtype.kind == "c":
            return value
        if value.array is not None:
            return constant(np.broadcast_to(value.array, value.shape))
        return self.emit("Expand", [value, integers(value.shape)], value.shape, value.dtype)

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """`value` in another shape."""
        shape = tuple(shape)
        value = self.full(value)
        if value.shape == shape:
            return value
        if value.array is not None:
            return constant(value.array.reshape(shape))
        # Without allowzero a 0 stands for the size that the axis has.
        return self.emit("Reshape", [value, integers(shape)], shape, value.dtype, allowzero=1)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """`value` with its axes in another order."""
        order = tuple(order)
        if order == tuple(range(len(order))):
            return value
        value = self.full(value)
        if value.array is not None:
            return constant(value.array.transpose(order))
        shape = [value.shape[axis] for axis in order]
        return self.emit("Transpose", [value], shape, value.dtype, perm=order)

    def slice(
        self,
        value: Value,
        starts: Sequence[int],
        stops: Sequence[int],
        steps: Sequence[int] | None = None,
    ) -> Value:
        """`value[start:stop:step, ...]` of every axis."""
        value = self.full(value)
        steps = [1] * len(starts) if steps is None else list(steps)
        shape = [
            max(0, -(-(stop - start) // step))
            for start, stop, step in zip(starts, stops, steps, strict=True)
        ]
        axes = [
            axis for axis, size in enumerate(shape) if size != value.shape[axis] or steps[axis] != 1
        ]
        if not axes:
            return value
        bounds = [integers([part[axis] for axis in axes]) for part in (starts, stops)]
        operands = [value, *bounds, integers(axes), integers([steps[axis] for axis in axes])]
        return self.emit("Slice", operands, shape, value.dtype)

    def model(self, inputs: Sequence[Value], outputs: Sequence[tuple[str, Value]], about: str):
        """The finished `onnx.ModelProto`; outputs are renamed, what none of them needs is left out."""
        helper = self._onnx.helper
        named = []
        for name, value in outputs:
            value = self.full(value)
            self.nodes.append(helper.make_node("Identity", [self.name_of(value)], [name]))
            named.append((name, value))
        nodes, initializers = self._needed({name for name, _ in named})
        graph = helper.make_graph(
            nodes,
            "edgespeech",
            [self._info(value.name, value) for value in inputs],
            [self._info(name, value) for name, value in named],
            initializers,
            doc_string=about,
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(
            graph, opset_imports=[opset], ir_version=10, producer_name="edgespeech"
        )

    def _needed(self, names: set[str]) -> tuple[list[Any], list[Any]]:
        """The nodes and initialisers that these values are computed from, in order."""
        names, nodes = set(names), []
        for node in reversed(self.nodes):
            if names.intersection(node.output):
                nodes.append(node)
                names.update(node.input)
        return nodes[::-1], [tensor for tensor in self.initializers if tensor.name in names]

    def _info(self, name: str | None, value: Value):
        return self._onnx.helper.make_tensor_value_info(
            name, self.element_type(value.dtype), value.shape
        )
