"""The `.ort` reader against files that flatbuffers' own builder writes."""

import flatbuffers
import numpy as np
import pytest

from edgespeech.errors import InputError
from edgespeech.interop.ort_format import read_ort


class Writer:
    """Tables and vectors of a flatbuffer; every method returns what a field takes."""

    def __init__(self):
        self.builder = flatbuffers.Builder(1024)

    def strings(self, values):
        return self.offsets([self.builder.CreateString(v) for v in values])

    def offsets(self, values):
        self.builder.StartVector(4, len(values), 4)
        for value in reversed(values):
            self.builder.PrependUOffsetTRelative(value)
        return self.builder.EndVector()

    def numbers(self, values, dtype):
        return self.builder.CreateNumpyVector(np.asarray(values, dtype))

    def table(self, size, **fields):
        """Fields by place: `o3=offset`, `i3=int32`, `l3=int64`, `f3=float32`."""
        add = {
            "o": self.builder.PrependUOffsetTRelativeSlot,
            "i": self.builder.PrependInt32Slot,
            "l": self.builder.PrependInt64Slot,
            "f": self.builder.PrependFloat32Slot,
        }
        self.builder.StartObject(size)
        for name, value in fields.items():
            add[name[0]](int(name[1:]), value, 0)
        return self.builder.EndObject()

    def tensor(self, name, dims, code, data):
        raw = self.numbers(np.frombuffer(data, np.uint8), np.uint8)
        dims = self.numbers(dims, np.int64)
        return self.table(7, o0=self.builder.CreateString(name), o2=dims, i3=code, o4=raw)

    def attribute(self, name, code, **value):
        return self.table(13, o0=self.builder.CreateString(name), i2=code, **value)

    def node(self, name, op, inputs, outputs, attributes=()):
        text = self.builder.CreateString
        inputs, outputs = self.strings(inputs), self.strings(outputs)
        attributes = self.offsets(attributes)
        return self.table(13, o0=text(name), o5=text(op), o8=inputs, o9=outputs, o10=attributes)

    def graph(self, tensors, nodes, inputs, outputs):
        inputs, outputs = self.strings(inputs), self.strings(outputs)
        return self.table(
            9, o0=self.offsets(tensors), o2=self.offsets(nodes), o5=inputs, o6=outputs
        )

    def file(self, path, graph, identifier=b"ORTM"):
        model = self.table(10, l0=8, o7=graph)
        version = self.builder.CreateString("1.22.0")
        session = self.table(4, o0=version, o1=model)
        self.builder.Finish(session, file_identifier=identifier)
        path.write_bytes(self.builder.Output())
        return path


MATRIX = np.arange(-3, 3, dtype=np.int8).reshape(2, 3)
SCALE = np.array([0.25], np.float32)


def write(path, identifier=b"ORTM", code=3, dims=(2, 3)):
    """A graph with one constant of a given type and shape, a scalar, and a branch inside a node."""
    w = Writer()
    inner_node = w.node("/inner/Neg", "Neg", ["outer"], ["negated"])
    inner_tensor = w.tensor("inner.axes", [3], 7, np.array([4, -1, 2**40], np.int64).tobytes())
    inner = w.graph([inner_tensor], [inner_node], [], ["negated"])
    ints, floats = w.numbers([7, -7], np.int64), w.numbers([0.5], np.float32)
    names = w.strings(["a", "b"])
    value = w.tensor("", [1], 1, np.array([-3.5], np.float32).tobytes())
    attributes = [
        w.attribute("branch", 5, o7=inner),
        w.attribute("epsilon", 1, f3=1e-5),
        w.attribute("axis", 2, l4=-1),
        w.attribute("zero", 2),
        w.attribute("mode", 3, o5=w.builder.CreateString("zero")),
        w.attribute("value", 4, o6=value),
        w.attribute("scales", 6, o8=floats),
        w.attribute("pads", 7, o9=ints),
        w.attribute("names", 8, o10=names),
    ]
    nodes = [
        w.node("/layers.0/MatMul", "MatMul", ["x", "weight"], ["y"]),
        w.node("", "Everything", ["y", ""], ["z", "outer"], attributes),
    ]
    tensors = [
        w.tensor("weight", dims, code, MATRIX.tobytes()),
        w.tensor("scale", [], 1, SCALE.tobytes()),
    ]
    return w.file(path, w.graph(tensors, nodes, ["x"], ["z"]), identifier)


def test_reads_what_was_written(tmp_path):
    graph = read_ort(write(tmp_path / "model.ort"))
    assert (graph.inputs, graph.outputs) == (("x",), ("z",))
    assert list(graph.initializers) == ["weight", "scale"]
    weight, scale = graph.initializers.values()
    assert (weight.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, ())
    np.testing.assert_array_equal(weight, MATRIX)
    assert scale == 0.25
    first, second = graph.nodes
    assert first[:4] == ("/layers.0/MatMul", "MatMul", ("x", "weight"), ("y",))
    assert first.attributes == {}
    assert second[:4] == ("", "Everything", ("y", ""), ("z", "outer"))
    found = second.attributes
    inner = found.pop("branch")
    assert found.pop("value").tolist() == [-3.5]
    assert found.pop("epsilon") == np.float32(1e-5)
    assert found == {
        **{"axis": -1, "zero": 0, "mode": "zero", "scales": [0.5], "pads": [7, -7]},
        "names": ["a", "b"],
    }
    assert inner.initializers["inner.axes"].tolist() == [4, -1, 2**40]
    assert inner.nodes[0][:4] == ("/inner/Neg", "Neg", ("outer",), ("negated",))


def test_constants_cannot_be_written_to(tmp_path):
    weight = read_ort(write(tmp_path / "model.ort")).initializers["weight"]
    with pytest.raises(ValueError, match="read-only"):
        weight[0, 0] = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identifier": b"TFL3"}, "does not carry the identifier ORTM"),
        ({"code": 8}, "'weight' is of type 8"),
        ({"dims": (2, 2)}, r"'weight' of shape \[2, 2\] and type int8 has 6 bytes"),
        ({"code": 1}, "type float32 has 6 bytes"),
    ],
)
def test_what_it_cannot_read_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read_ort(write(tmp_path / "model.ort", **changes))


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_ort(tmp_path / "no.ort")
    data = write(tmp_path / "model.ort").read_bytes()
    (tmp_path / "empty.ort").write_bytes(b"")
    with pytest.raises(InputError, match="identifier"):
        read_ort(tmp_path / "empty.ort")
    # the builder writes from the end, so a cut anywhere takes something that is needed
    for length in range(8, len(data) - 16, 37):
        (tmp_path / "cut.ort").write_bytes(data[:length])
        with pytest.raises(InputError, match="damaged"):
            read_ort(tmp_path / "cut.ort")
