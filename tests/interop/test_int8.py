"""8-bit weights: rounding by columns, the quantised graph against its arithmetic in NumPy, and what is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.interop.int8 import quantize_onnx, quantize_weights
from edgespeech.interop.onnx_export import to_onnx
from edgespeech.nn.transformer import ConvPositions
from edgespeech.ops.conv import grouped_conv1d
from tests.support.modules import randomize

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(model, **feed):
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["y"], feed)[0]


def graph(function, *shape):
    return to_onnx(function, {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}, ["y"])


def test_every_column_has_a_scale_of_its_own():
    weights = random(40, 6) * 10.0 ** np.arange(-3, 3)
    weights[:, 2] = 0.0
    values, scale = quantize_weights(weights, axis=1)
    assert values.dtype == np.int8
    largest = np.abs(weights).max(0)
    np.testing.assert_allclose(scale[largest > 0], largest[largest > 0] / 127, rtol=1e-6)
    np.testing.assert_array_equal(np.abs(values).max(0), [127, 127, 0, 127, 127, 127])
    assert (np.abs(values * scale - weights) <= scale / 2 + 1e-7).all()


def quantized_input(x):
    """`DynamicQuantizeLinear`: one scale for the tensor, its range widened to hold 0."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    scale = (high - low) / 255
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return scale, zero, np.clip(np.rint(x / scale) + zero, 0, 255)


def test_linear_layer_is_the_arithmetic_on_integers():
    x, weights, bias = random(2, 150, 32), random(32, 24, seed=1), random(24, seed=2)
    weights *= np.geomspace(0.01, 10, 24).astype(np.float32)
    model = quantize_onnx(graph(lambda x: x @ weights + bias, 2, 150, 32))
    onnx.checker.check_model(model, full_check=True)
    got = run(model, x=x)
    x_scale, zero, x_values = quantized_input(x)
    w_values, w_scale = quantize_weights(weights, axis=1)
    want = x_scale * w_scale * ((x_values - zero) @ w_values.astype(float)) + bias
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    # Next to float32, each column is off by about a percent of its own size, small or large.
    exact = x @ weights
    error = np.sqrt(np.mean((want - bias - exact) ** 2, (0, 1)) / np.mean(exact**2, (0, 1)))
    assert (error < 0.02).all()


def test_positions_are_folded_before_they_are_rounded():
    """The scale is that of the kernel that is applied, whatever the gains are."""
    positions = randomize(ConvPositions(32, 8, 4, rngs=nnx.Rngs(0)), 0, 0.1)
    positions.gain[...] = positions.gain[...] * jnp.geomspace(0.1, 10, 8)[:, None, None]
    x = random(1, 9, 32)
    model = quantize_onnx(graph(lambda x: positions(x, jnp.array([9])), 1, 9, 32))
    types = {t.name: onnx.numpy_helper.to_array(t).dtype for t in model.graph.initializer}
    assert np.dtype(np.int8) in types.values()
    (conv,) = [node for node in model.graph.node if node.op_type == "Conv"]
    (dequantize,) = [node for node in model.graph.node if node.output[0] == conv.input[1]]
    assert dequantize.op_type == "DequantizeLinear"
    assert types[dequantize.input[0]] == np.int8

    kernel = np.asarray(positions.kernel()).transpose(2, 1, 0)  # [out in taps]
    values, scale = quantize_weights(kernel, axis=0)
    rounded = (values * scale[:, None, None]).transpose(2, 1, 0)
    y = grouped_conv1d(jnp.pad(x, ((0, 0), (4, 3), (0, 0))), rounded, 4)
    want = jax.nn.gelu(y + positions.bias[...], approximate=False)
    np.testing.assert_allclose(run(model, x=x), want, rtol=1e-4, atol=1e-5)


def test_one_input_of_three_layers_is_quantised_once():
    x, weights = random(1, 4, 32), random(3, 32, 16)
    model = quantize_onnx(graph(lambda x: sum(x @ w for w in weights), 1, 4, 32))
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("DynamicQuantizeLinear") == 1
    assert ops.count("MatMulInteger") == 3
    np.testing.assert_allclose(run(model, x=x), x @ weights.sum(0), atol=0.3)


def test_small_weights_and_products_of_inputs_stay_in_float():
    small = random(4, 8)
    original = graph(lambda x: jnp.einsum("ni,mi->nm", x @ small, x @ small), 5, 4)
    model = quantize_onnx(original)
    assert [node.op_type for node in model.graph.node] == [
        node.op_type for node in original.graph.node
    ]
    x = random(5, 4)
    np.testing.assert_array_equal(run(model, x=x), run(original, x=x))


def test_file_is_a_quarter():
    weights = random(256, 256)
    original = graph(lambda x: jnp.tanh(x @ weights) @ weights.T, 1, 3, 256)
    model = quantize_onnx(original)
    assert model.ByteSize() < 0.27 * original.ByteSize()


def test_mel_filters_stay_in_float():
    filters, weights = np.abs(random(65, 40)), random(40, 32)

    def function(x):
        power = jnp.square(jnp.abs(jnp.fft.rfft(x, n=128).real))
        return jnp.log(power @ filters + 1e-7) @ weights

    model = quantize_onnx(graph(function, 1, 3, 128))
    ops = [node.op_type for node in model.graph.node]
    assert (ops.count("MatMul"), ops.count("MatMulInteger")) == (1, 1)
    assert ops.index("MatMul") < ops.index("MatMulInteger")
