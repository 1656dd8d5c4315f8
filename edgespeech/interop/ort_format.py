"""ONNX Runtime's `.ort` files: the graph and its constants, read without ONNX Runtime.

The format is a flatbuffer (schema: `onnxruntime/core/flatbuffers/schema/ort.fbs`; file identifier "ORTM"). This reader
knows the places of the few fields that it needs. Constants are views of the file's bytes; nothing is executed.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flatbuffers import encode, number_types
from flatbuffers.table import Table

from edgespeech.errors import InputError

IDENTIFIER = b"ORTM"

# A field's place in its table, from the schema.
SESSION_MODEL = 1
MODEL_GRAPH = 7
GRAPH_INITIALIZERS, GRAPH_NODES, GRAPH_INPUTS, GRAPH_OUTPUTS = 0, 2, 5, 6
NODE_NAME, NODE_OP_TYPE, NODE_INPUTS, NODE_OUTPUTS, NODE_ATTRIBUTES = 0, 5, 8, 9, 10
TENSOR_NAME, TENSOR_DIMS, TENSOR_DATA_TYPE, TENSOR_RAW_DATA = 0, 2, 3, 4
ATTRIBUTE_NAME, ATTRIBUTE_TYPE = 0, 2

# ONNX's TensorProto.DataType -> numpy; the types without an equal there (strings, bfloat16, 4 bits) are refused.
DATA_TYPES = {
    1: "<f4",
    2: "u1",
    3: "i1",
    4: "<u2",
    5: "<i2",
    6: "<i4",
    7: "<i8",
    9: "?",
    10: "<f2",
    11: "<f8",
    12: "<u4",
    13: "<u8",
}


class _Contents(bytes):
    """A file's bytes.

    Attributes:
        unread: elements of vectors that may still be read. A sound file lists no table twice, so 4 bytes are read as
            an element once; tables of a damaged one that contain each other would take for ever.
    """

    unread: int

    def __init__(self, data: bytes):
        self.unread = len(data) // 4


class OrtNode(NamedTuple):
    """One operation of a graph.

    Attributes:
        name: may be empty.
        op_type: of ONNX or of ONNX Runtime, such as `MatMulInteger`.
        inputs, outputs: names of values; an optional one that is left out is empty.
        attributes: by name: int, float, str, `ndarray`, `OrtGraph`, and lists of the first three.
    """

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


class OrtGraph(NamedTuple):
    """A graph; those of `If` and `Loop` are attributes of their nodes.

    Attributes:
        initializers: constants by name, read-only arrays with the file's type and shape.
        nodes: in the order of the file.
        inputs, outputs: names of the graph's own values.
    """

    initializers: dict[str, np.ndarray]
    nodes: tuple[OrtNode, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_ort(path: str | Path) -> OrtGraph:
    """The main graph of a `.ort` file.

    Raises:
        InputError: the file is missing, is not of this format, is damaged, or holds a constant of an unknown type or
            outside the file (all named).
    """
    try:
        data = _Contents(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): name an .ort file") from error
    if data[4:8] != IDENTIFIER:
        raise InputError(
            f"{path} does not carry the identifier {IDENTIFIER.decode()} of ONNX Runtime's format: name an .ort file "
            "(an .onnx file is another format)"
        )
    try:
        session = Table(data, encode.Get(number_types.UOffsetTFlags.packer_type, data, 0))
        model = _table(session, SESSION_MODEL)
        graph = None if model is None else _table(model, MODEL_GRAPH)
        if graph is None:
            raise ValueError("no graph")
        return _read_graph(graph)
    except (ValueError, TypeError, KeyError, struct.error, RecursionError) as error:
        raise InputError(f"{path} is damaged or of another version: {error}") from error


def _read_graph(graph: Table) -> OrtGraph:
    tensors = [_read_tensor(tensor) for tensor in _tables(graph, GRAPH_INITIALIZERS)]
    return OrtGraph(
        initializers=dict(tensors),
        nodes=tuple(_read_node(node) for node in _tables(graph, GRAPH_NODES)),
        inputs=_strings(graph, GRAPH_INPUTS),
        outputs=_strings(graph, GRAPH_OUTPUTS),
    )


def _read_node(node: Table) -> OrtNode:
    return OrtNode(
        name=_string(node, NODE_NAME),
        op_type=_string(node, NODE_OP_TYPE),
        inputs=_strings(node, NODE_INPUTS),
        outputs=_strings(node, NODE_OUTPUTS),
        attributes=dict(_read_attribute(a) for a in _tables(node, NODE_ATTRIBUTES)),
    )


def _read_tensor(tensor: Table) -> tuple[str, np.ndarray]:
    name = _string(tensor, TENSOR_NAME)
    code = _scalar(tensor, TENSOR_DATA_TYPE, number_types.Int32Flags)
    if code not in DATA_TYPES:
        raise ValueError(f"constant {name!r} is of type {code}, known are {sorted(DATA_TYPES)}")
    dims = _vector(tensor, TENSOR_DIMS, "<i8")
    raw = _vector(tensor, TENSOR_RAW_DATA, "u1")
    dtype = np.dtype(DATA_TYPES[code])
    if raw.size != dtype.itemsize * math.prod(dims.tolist()):  # of Python's integers: no overflow
        raise ValueError(
            f"constant {name!r} of shape {dims.tolist()} and type {dtype} has {raw.size} bytes in the file"
        )
    return name, raw.view(dtype).reshape(dims)


# AttributeType of the schema -> (place of the value in the table, how it is read).
ATTRIBUTE_VALUES = {
    1: (3, lambda table, i: _scalar(table, i, number_types.Float32Flags)),
    2: (4, lambda table, i: _scalar(table, i, number_types.Int64Flags)),
    3: (5, lambda table, i: _string(table, i)),
    4: (6, lambda table, i: _read_tensor(_required(table, i))[1]),
    5: (7, lambda table, i: _read_graph(_required(table, i))),
    6: (8, lambda table, i: _vector(table, i, "<f4").tolist()),
    7: (9, lambda table, i: _vector(table, i, "<i8").tolist()),
    8: (10, lambda table, i: list(_strings(table, i))),
}


def _read_attribute(attribute: Table) -> tuple[str, Any]:
    name = _string(attribute, ATTRIBUTE_NAME)
    code = _scalar(attribute, ATTRIBUTE_TYPE, number_types.Int32Flags)
    if code not in ATTRIBUTE_VALUES:
        raise ValueError(f"attribute {name!r} is of type {code}, known are 1 to 8")
    place, read = ATTRIBUTE_VALUES[code]
    return name, read(attribute, place)


# --- flatbuffers: fields of a table by their place


def _offset(table: Table, place: int) -> int:
    """Where the field lies within its table; 0 when the file leaves it out."""
    return table.Offset(4 + 2 * place)


def _scalar(table: Table, place: int, flags: Any) -> Any:
    offset = _offset(table, place)
    return table.Get(flags, table.Pos + offset) if offset else flags.py_type(0)


def _string(table: Table, place: int) -> str:
    offset = _offset(table, place)
    return table.String(table.Pos + offset).decode() if offset else ""


def _table(table: Table, place: int) -> Table | None:
    offset = _offset(table, place)
    return Table(table.Bytes, table.Indirect(table.Pos + offset)) if offset else None


def _required(table: Table, place: int) -> Table:
    found = _table(table, place)
    if found is None:
        raise ValueError(f"field {place} of a table is missing")
    return found


def _vector(table: Table, place: int, dtype: str) -> np.ndarray:
    offset = _offset(table, place)
    if not offset:
        return np.zeros(0, dtype)
    return np.frombuffer(table.Bytes, dtype, table.VectorLen(offset), table.Vector(offset))


def _elements(table: Table, place: int) -> list[int]:
    """Positions of a vector's elements, each an offset of 4 bytes."""
    offset = _offset(table, place)
    if not offset:
        return []
    start, size = table.Vector(offset), table.VectorLen(offset)
    if start + 4 * size > len(table.Bytes):
        raise ValueError(f"a vector of {size} elements reaches beyond the end of the file")
    table.Bytes.unread -= size
    if table.Bytes.unread < 0:
        raise ValueError("its vectors have more elements than the file has room for")
    return [start + 4 * i for i in range(size)]


def _tables(table: Table, place: int) -> list[Table]:
    return [Table(table.Bytes, table.Indirect(at)) for at in _elements(table, place)]


def _strings(table: Table, place: int) -> tuple[str, ...]:
    return tuple(table.String(at).decode() for at in _elements(table, place))
