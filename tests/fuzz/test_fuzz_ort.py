"""Damaged exported files: `.ort` graphs, ONNX and StableHLO with their manifests."""

import json

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgespeech.interop.exported import Exported, manifest_path, open_exported
from edgespeech.interop.ort_format import read_ort
from tests.fuzz.damage import damaged, damaged_json, fuzz, read_or_refuse
from tests.interop.test_ort_format import Writer, write

T = 160  # samples of the exported functions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def ort(folder):
    return write(folder / "sound.ort").read_bytes()


@fuzz(200)
@given(data=st.binary(max_size=200))
def test_unlike_any_ort(data, folder):
    (folder / "a.ort").write_bytes(b"\x10\0\0\0ORTM" + data)
    graph = read_or_refuse(read_ort, folder / "a.ort")
    assert graph is None or len(graph.nodes) <= len(data)


def test_ort(ort, folder):
    @fuzz(300)
    @given(data=damaged(ort))
    def every(data):
        path = folder / "a.ort"
        path.write_bytes(data)
        graph = read_or_refuse(read_ort, path)
        if graph is not None:
            held = [*graph.initializers.values(), *graph.nodes]
            assert len(held) <= len(data)
            assert all(array.nbytes <= len(data) for array in graph.initializers.values())

    every()


def test_ort_of_tables_that_are_shared(folder):
    """A graph with one node twice, whose graph has one node twice, and so on: 2^40 of them in 5 kB."""
    w = Writer()
    graph = w.graph([], [], [], [])
    for _ in range(40):
        node = w.node("", "If", [], [], [w.attribute("branch", 5, o7=graph)])
        graph = w.graph([], [node, node], [], [])
    path = w.file(folder / "shared.ort", graph)
    assert read_or_refuse(read_ort, path) is None


# ---------------------------------------------------------------------------- files of `edgespeech export`


def model(audio, length):
    frames = audio.reshape(1, -1, 16) @ jnp.ones((16, 3))
    return frames, length // 16


MANIFEST = {
    "format": "stablehlo",
    "bits": 32,
    "seconds": 0.01,
    "inputs": {"audio": {"shape": [1, T]}, "length": {"shape": [1]}},
    "vocabulary": ["", " ", "A"],
}


def stablehlo():
    shapes = jax.ShapeDtypeStruct((1, T), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return bytes(jax.export.export(jax.jit(model))(*shapes).serialize())


def onnx_file():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from edgespeech.interop.onnx_export import to_onnx

    shapes = {
        "audio": jax.ShapeDtypeStruct((1, T), jnp.float32),
        "length": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    return to_onnx(model, shapes, ("logits", "frames")).SerializeToString()


@pytest.fixture(scope="module", params=["stablehlo", "onnx"])
def exported(request, folder):
    """A file, and the manifest beside it."""
    data = stablehlo() if request.param == "stablehlo" else onnx_file()
    path = folder / f"model.{request.param}"
    manifest = MANIFEST | {"format": request.param}
    manifest["bytes"] = len(data)
    path.write_bytes(data)
    manifest_path(path).write_text(json.dumps(manifest))
    assert open_exported(path).logits(np.ones(T, np.float32)).shape == (T // 16, 3)
    return path, data, manifest


def check(found):
    assert isinstance(found, Exported)
    assert found.samples > 0
    assert isinstance(found.manifest, dict)


def test_exported_models(exported):
    path, sound, manifest = exported
    manifest_path(path).write_text(json.dumps(manifest))

    @fuzz(60)
    @given(data=damaged(sound))
    def every(data):
        path.write_bytes(data)
        found = read_or_refuse(open_exported, path)
        if found is not None:
            check(found)

    every()
    path.write_bytes(sound)


def test_manifests(exported):
    path, sound, manifest = exported
    path.write_bytes(sound)

    @fuzz(40)
    @given(content=damaged_json(manifest))
    def every(content):
        manifest_path(path).write_text(json.dumps(content))
        found = read_or_refuse(open_exported, path)
        if found is not None:
            check(found)

    every()
    for text in ("[" * 100_000, "", "[]", "null"):
        manifest_path(path).write_text(text)
        assert read_or_refuse(open_exported, path) is None
