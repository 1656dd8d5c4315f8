"""Core ML packages, by their structure: what is in them, under which names, and that the weights are there.

Running one takes an Apple system; what coremltools works out by itself is compared with JAX.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from edgespeech.cli import main
from edgespeech.conversion.mixers import lpa_factory
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.interop.coreml_export import to_coreml, to_mil
from edgespeech.interop.exported import export, manifest_path, open_exported
from edgespeech.interop.exported_exits import MANIFEST
from edgespeech.interop.parity import speech_like
from edgespeech.interop.pretrained import save_pretrained
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.nn.lpa import harden
from edgespeech.ops.features import log_mel
from tests.interop.test_export import ALL_KINDS
from tests.support.modules import randomize
from tests.support.tiny import tiny_model
from tests.support.tiny_exits import exit_model

coremltools = pytest.importorskip("coremltools")
pytest.importorskip("stablehlo_coreml")


def interface(features):
    return [(f.name, list(f.type.multiArrayType.shape)) for f in features]


def operations(spec):
    """Types of the operations of an ML program, in order."""
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    return [operation.type for operation in block.operations]


def test_hybrid(tmp_path):
    """A whole model with hard pulses of every kind, as a package and its manifest."""
    model = tiny_model(seed=4, num_layers=1)
    model.layers[0].mixer = lpa_factory(ALL_KINDS)(model.layers[0].mixer, nnx.Rngs(0))
    harden(randomize(model, 1, 0.2))
    path = tmp_path / "model.mlpackage"
    manifest = export(model, CharTokenizer(), {}, path, form="coreml", seconds=0.5)
    assert manifest == json.loads(manifest_path(path).read_text())
    assert manifest["bytes"] == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    spec = coremltools.utils.load_spec(str(path))
    n = model.config.num_frames(8000)
    assert interface(spec.description.input) == [("audio", [1, 8000]), ("length", [1])]
    assert interface(spec.description.output) == [
        ("logits", [1, n, CharTokenizer().vocab_size]),
        ("frames", [1]),
    ]
    kinds = coremltools.proto.FeatureTypes_pb2.ArrayFeatureType
    features = (*spec.description.input, *spec.description.output)
    types = [feature.type.multiArrayType.dataType for feature in features]
    assert "while_loop" not in operations(spec)
    assert types == [kinds.FLOAT32, kinds.INT32, kinds.FLOAT32, kinds.INT32]
    (weights,) = path.rglob("weight.bin")
    assert weights.stat().st_size > 0.9 * 4 * count_parameters(model)
    with pytest.raises(InputError, match="runs on Apple's systems alone"):
        open_exported(path)


def test_features_and_masks_as_coremltools_computes_them():
    """A program without inputs is worked out while it is built: operation by operation, in NumPy."""
    audio = speech_like(1600, seed=4)[None]

    def function():
        x = log_mel(jnp.asarray(audio), 12)
        mask = jnp.arange(x.shape[1]) < 5
        return jnp.where(mask[:, None], x, 0.0), jax.nn.softmax(x, -1)

    found = to_mil(function, {}).functions["main"].outputs
    for value, want in zip(found, jax.jit(function)(), strict=True):
        np.testing.assert_allclose(value.val, want, rtol=1e-4, atol=1e-3)


def test_exits_by_the_command(tmp_path, capsys):
    """One package for each segment, without a word about parity."""
    model = exit_model(vocab_size=CharTokenizer().vocab_size, num_exits=1)
    save_pretrained(tmp_path / "saved", model, CharTokenizer(), {})
    options = ["--format=coreml", "--seconds=0.3", "--exits", f"--output={tmp_path}"]
    assert main(["export", f"--model={tmp_path / 'saved'}", *options]) == 0
    assert "converted, not run" in capsys.readouterr().out
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert "difference_from_jax" not in manifest
    files = [segment["file"] for segment in manifest["segments"]]
    assert files == ["embed.mlpackage", "exit_1.mlpackage"]
    n, d = manifest["frames"], manifest["width"]
    spec = coremltools.utils.load_spec(str(tmp_path / files[1]))
    assert interface(spec.description.input) == [("x", [1, n, d]), ("frames", [1])]
    assert interface(spec.description.output) == [
        ("next_x", [1, n, d]),
        ("logits", [1, n, model.config.vocab_size]),
    ]
    assert "while_loop" not in operations(spec)


def test_what_cannot_be_converted_is_refused():
    shapes = {"x": jax.ShapeDtypeStruct((4,), jnp.float32)}
    with pytest.raises(InputError, match="'abs' of a complex array has no rule"):
        to_coreml(lambda x: jnp.abs(jnp.fft.rfft(x)), shapes, ["y"])
    with pytest.raises(InputError, match="the converter refuses the model"):
        to_coreml(lambda x: lax.population_count(x.astype(jnp.int32)), shapes, ["y"])
