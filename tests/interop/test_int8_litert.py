"""8-bit weights in LiteRT files: the arithmetic in NumPy, what is left alone, and a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.interop.exported import export, open_exported
from edgespeech.interop.int8 import quantize_weights
from edgespeech.interop.int8_litert import mel_products, quantize_litert
from edgespeech.interop.litert_export import load_litert, to_litert
from edgespeech.interop.parity import compare
from tests.support.modules import randomize
from tests.support.tiny import tiny_model

pytest.importorskip("ai_edge_litert")
pytest.importorskip("ai_edge_quantizer")
pytest.importorskip("litert_converter")


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def graph(function, *shape):
    return to_litert(function, {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}, ["y"])


def run(data, path, x):
    path.write_bytes(data)
    return load_litert(path, threads=1)(x)[0]


def test_linear_layer_is_the_arithmetic_on_integers(tmp_path):
    """Weights have a scale a column, the input a scale and a zero point a row; columns differ in size by 1000."""
    weights = random(32, 24, seed=1) * np.geomspace(0.01, 10, 24).astype(np.float32)
    data = graph(lambda x: x @ weights, 6, 32)
    eight = quantize_litert(data)
    assert len(eight) < len(data) - 1.5 * weights.size
    x = random(6, 32)
    got = run(eight, tmp_path / "x.tflite", x)
    values, scale = quantize_weights(weights, axis=1)
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    step = (high - low) / 255
    rounded = np.rint(x / step) * step
    want = scale * (rounded @ values.astype(np.float64))
    size = np.abs(x @ weights).max(0)
    assert (np.abs(got - want) < 0.01 * size).all()
    assert not np.allclose(got, x @ weights, rtol=1e-4, atol=1e-6)


def test_mel_filters_stay_in_float(tmp_path):
    filters, weights = np.abs(random(65, 40)), random(40, 32)

    def power(x):
        return jnp.square(jnp.abs(jnp.fft.rfft(x, n=128).real))

    data = graph(lambda x: jnp.log(power(x) @ filters + 1e-7) @ weights, 1, 3, 128)
    (name,) = mel_products(data)
    eight = quantize_litert(data)
    assert mel_products(eight) == [name]
    # Rows of very different loudness within one spectrum: 8 bits of the loudest would leave no other.
    x = random(1, 3, 128) * np.geomspace(1e-3, 1, 128).astype(np.float32)
    mel = graph(lambda x: jnp.log(power(x) @ filters + 1e-7), 1, 3, 128)
    np.testing.assert_array_equal(
        run(quantize_litert(mel), tmp_path / "a.tflite", x), run(mel, tmp_path / "b.tflite", x)
    )
    whole = run(eight, tmp_path / "c.tflite", x), run(data, tmp_path / "d.tflite", x)
    gap = np.abs(whole[0] - whole[1]).max()
    assert 0 < gap < 0.02 * np.abs(whole[1]).max()


def test_whole_model(tmp_path):
    model = randomize(tiny_model(seed=3, num_layers=2), 1, 0.2)
    path = tmp_path / "model.tflite"
    give = (model, CharTokenizer(), {}, path)
    whole = export(*give, form="litert", seconds=0.5)
    manifest = export(*give, form="litert", seconds=0.5, int8=True)
    assert (manifest["bits"], manifest["bytes"]) == (8, path.stat().st_size)
    assert manifest["bytes"] < whole["bytes"]
    gap = compare(model, open_exported(path, threads=1))
    assert gap.largest > 1e-4
    assert gap.relative < 0.1
