"""Core ML packages, by their structure: what is in them, under which names, and that the weights are there.

Running one takes an Apple system; what coremltools works out by itself is compared with JAX.
"""

import dataclasses
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
from edgespeech.interop.coreml_export import (
    quantize_coreml,
    save_coreml,
    to_coreml,
    to_mil,
)
from edgespeech.interop.exported import export, manifest_path, open_exported
from edgespeech.interop.exported_exits import MANIFEST
from edgespeech.interop.int8 import quantize_weights
from edgespeech.interop.parity import speech_like
from edgespeech.interop.pretrained import save_pretrained
from edgespeech.interop.streaming_export import state_path
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.nn.lpa import harden
from edgespeech.ops.features import log_mel
from tests.interop.test_export import ALL_KINDS
from tests.support.edge import TOKENIZER, TOY
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


def test_a_step_of_a_stream(tmp_path, capsys):
    """By the command: every leaf of the state is an input and an output."""
    for mixer in ("attention", "lpa"):
        config = dataclasses.replace(TOY, mixer=mixer, num_layers=1, left=2)
        model = randomize(EdgeConformer(config, rngs=nnx.Rngs(0)), 1)
        save_pretrained(tmp_path / mixer, model, TOKENIZER, {})
        options = ["--format=coreml", "--streaming", f"--output={tmp_path / 'out'}"]
        assert main(["export", f"--model={tmp_path / mixer}", *options]) == 0
        assert "converted, not run" in capsys.readouterr().out
        path = tmp_path / "out" / "step.mlpackage"
        manifest = json.loads(manifest_path(path).read_text())
        spec = coremltools.utils.load_spec(str(path))
        leaves = {name: leaf["shape"] for name, leaf in manifest["state"]["leaves"].items()}
        assert interface(spec.description.input) == [
            ("audio", [1, manifest["chunk_samples"]]),
            ("length", [1]),
            *((f"state_{name}", shape) for name, shape in leaves.items()),
        ]
        outputs = [name for name, _ in interface(spec.description.output)]
        assert outputs == ["logits", "frames", *(f"next_{name}" for name in leaves)]
        assert manifest["state"]["input_prefix"] == "state_"
        with np.load(state_path(path)) as first:
            assert {name: list(first[name].shape) for name in first.files} == leaves
        assert "while_loop" not in operations(spec)


def test_8_bits_are_those_of_the_weights(tmp_path):
    """Values and scales as they are stored, against `quantize_weights`; small tensors stay."""
    weights, small = (
        np.random.default_rng(i).normal(size=shape).astype(np.float32)
        for i, shape in enumerate([(48, 32), (32, 4)])
    )
    weights *= np.geomspace(0.01, 10, 32).astype(np.float32)
    shapes = {"x": jax.ShapeDtypeStruct((6, 48), jnp.float32)}
    model = to_coreml(lambda x: jnp.tanh(x @ weights) @ small, shapes, ["y"])
    spec = quantize_coreml(model).get_spec()
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    kinds = [operation.type for operation in block.operations]
    assert sum("constexpr" in kind for kind in kinds) == 1
    eight = save_coreml(quantize_coreml(model), tmp_path / "eight.mlpackage")
    assert eight < save_coreml(model, tmp_path / "whole.mlpackage") - 2 * weights.size
    (stored,) = (tmp_path / "eight.mlpackage").rglob("weight.bin")
    values, scale = quantize_weights(weights, axis=1)
    data = stored.read_bytes()
    # The converter may turn the matrix round.
    assert values.tobytes() in data or values.T.tobytes() in data
    assert scale.tobytes() in data


def test_what_cannot_be_converted_is_refused():
    shapes = {"x": jax.ShapeDtypeStruct((4,), jnp.float32)}
    with pytest.raises(InputError, match="'abs' of a complex array has no rule"):
        to_coreml(lambda x: jnp.abs(jnp.fft.rfft(x)), shapes, ["y"])
    with pytest.raises(InputError, match="the converter refuses the model"):
        to_coreml(lambda x: lax.population_count(x.astype(jnp.int32)), shapes, ["y"])
