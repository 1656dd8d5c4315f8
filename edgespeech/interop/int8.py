"""Weights of 8 bits for an exported ONNX graph.

A weight column w becomes `q = round(w / s)`, `s = max |w| / 127`: one scale for each output channel, because the
columns of one matrix differ in size by an order of magnitude.

    linear layers:  y = s_x s (x_q - z) q,   x_q = round(x / s_x) + z for each call (dynamic, one scale for all of x)
    convolutions:   y = conv(x, s q) in float32: they save memory, not time

The graph that `to_onnx` writes has the weight-normalised kernel of the positions as it is applied, so the scale is that
of the kernel and not of its direction. The mel filters stay in float32: the bins of a power spectrum span ten orders of
magnitude, of which one scale for all of them would leave the loudest two.
"""

import importlib
from typing import Any, NamedTuple

import numpy as np

from edgespeech.types import Float, Int

# Smaller tensors stay in float32: nothing is saved by them.
LEAST_ELEMENTS = 512


class Quantized(NamedTuple):
    """`weights ~ scale * values`, the scale along one axis.

    Attributes:
        values: int8 in [-127, 127], the shape of the weights.
        scale: float32, one for each channel.
    """

    values: Int[np.ndarray, "..."]
    scale: Float[np.ndarray, "c"]


def quantize_weights(weights: Float[np.ndarray, "..."], axis: int) -> Quantized:
    """One scale for each index along `axis`, the axis of output channels; zeros stay zero."""
    others = tuple(i for i in range(weights.ndim) if i != axis % weights.ndim)
    scale = np.abs(weights).max(others) / 127.0
    scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
    shape = [1] * weights.ndim
    shape[axis] = -1
    return Quantized(np.rint(weights / scale.reshape(shape)).astype(np.int8), scale)


def quantize_onnx(model: Any) -> Any:
    """A copy of an ONNX model with 8-bit weights in its linear layers and convolutions.

    Args:
        model: `onnx.ModelProto` in float32 from `to_onnx`.
    """
    onnx: Any = importlib.import_module("onnx")
    graph = model.graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    writer = _Writer(onnx, weights)
    spectra, nothing = _spectra(graph.node), np.empty(0)
    for node in graph.node:
        kernel = weights.get(node.input[1] if len(node.input) > 1 else "", nothing)
        is_large = kernel.dtype == np.float32 and kernel.size >= LEAST_ELEMENTS
        if (
            is_large
            and node.op_type == "MatMul"
            and kernel.ndim == 2
            and node.input[0] not in spectra
        ):
            writer.matmul(node)
        elif is_large and node.op_type == "Conv":
            writer.conv(node)
        else:
            writer.nodes.append(node)
    used = {name for node in writer.nodes for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in used]
    new = onnx.helper.make_graph(
        writer.nodes,
        graph.name,
        graph.input,
        graph.output,
        tensors + writer.tensors,
        doc_string=graph.doc_string,
    )
    return onnx.helper.make_model(
        new,
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
    )


def _spectra(nodes: Any) -> set[str]:
    """Values between a Fourier transform and the next matrix product."""
    found: set[str] = set()
    for node in nodes:
        if node.op_type == "DFT" or (node.op_type != "MatMul" and found.intersection(node.input)):
            found.update(node.output)
    return found


class _Writer:
    """Nodes and tensors of the new graph."""

    def __init__(self, onnx: Any, weights: dict[str, np.ndarray]):
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self._onnx = onnx
        self._weights = weights
        self._stored: dict[tuple[str, int], tuple[str, str]] = {}
        self._inputs: dict[str, tuple[str, str, str]] = {}

    def matmul(self, node: Any) -> None:
        """`MatMulInteger` of the quantised input, scaled back; ONNX Runtime fuses these nodes into one."""
        x, weight = node.input
        (y,) = node.output
        values, scale = self._store(weight, axis=1)
        x_values, x_scale, x_zero = self._quantized_input(x)
        self._add("MatMulInteger", [x_values, values, x_zero], f"{y}_int32")
        self._add("Cast", [f"{y}_int32"], f"{y}_whole", to=self._onnx.TensorProto.FLOAT)
        self._add("Mul", [x_scale, scale], f"{y}_scale")
        self._add("Mul", [f"{y}_whole", f"{y}_scale"], y)

    def conv(self, node: Any) -> None:
        """The same convolution on the kernel that its 8 bits stand for."""
        values, scale = self._store(node.input[1], axis=0)
        kernel = f"{node.output[0]}_kernel"
        self._add("DequantizeLinear", [values, scale], kernel, axis=0)
        attributes = {a.name: self._onnx.helper.get_attribute_value(a) for a in node.attribute}
        operands = [node.input[0], kernel, *node.input[2:]]
        self._add("Conv", operands, node.output[0], **attributes)

    def _store(self, name: str, axis: int) -> tuple[str, str]:
        if (name, axis) not in self._stored:
            quantized = quantize_weights(self._weights[name], axis)
            names = (f"{name}_int8", f"{name}_scale")
            for part, array in zip(names, quantized, strict=True):
                self.tensors.append(self._onnx.numpy_helper.from_array(array, part))
            self._stored[name, axis] = names
        return self._stored[name, axis]

    def _quantized_input(self, name: str) -> tuple[str, str, str]:
        """An input is quantised once, however many layers read it."""
        if name not in self._inputs:
            outputs = (f"{name}_uint8", f"{name}_x_scale", f"{name}_x_zero")
            self.nodes.append(
                self._onnx.helper.make_node("DynamicQuantizeLinear", [name], list(outputs))
            )
            self._inputs[name] = outputs
        return self._inputs[name]

    def _add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(self._onnx.helper.make_node(op, inputs, [output], **attributes))
