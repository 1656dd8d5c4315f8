"""A CTC head on Moonshine's encoder through everything that takes any CTC model: export, inspect, transcribe, bench."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx

from edgespeech.cli import main
from edgespeech.conversion.mixers import lpa_factory
from edgespeech.data.tokenizer import CharTokenizer, ctc_collapse
from edgespeech.interop.coreml_export import to_coreml
from edgespeech.interop.exported import OUTPUTS, ctc_function, export, open_exported
from edgespeech.interop.parity import compare, speech_like
from edgespeech.interop.pretrained import save_pretrained
from edgespeech.models.moonshine_ctc import MoonshineCTC, MoonshineCTCConfig
from edgespeech.nn.lpa import LPAConfig, harden
from edgespeech.ops.ctc import greedy_path
from edgespeech.types import SAMPLE_RATE
from tests.support.modules import randomize

NEEDS = {
    "stablehlo": (),
    "onnx": ("onnx", "onnxruntime"),
    "litert": ("ai_edge_litert", "litert_converter"),
}


def need(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")


@pytest.fixture(scope="module")
def model():
    """A layer with rotary attention, and one with pulses of every kind."""
    config = MoonshineCTCConfig(
        vocab_size=CharTokenizer().vocab_size,
        **{"width": 16, "num_layers": 2, "num_heads": 2, "ffn_width": 24, "rotary_factor": 0.8},
    )
    model = randomize(MoonshineCTC(config, rngs=nnx.Rngs(0)), 0, 0.2)
    lpa = LPAConfig(aperiodic=2, runs=1, periodic=1, positional=1, mean=1, kernel_size=3)
    model.layers[1].mixer = lpa_factory(lpa)(model.layers[1].mixer, nnx.Rngs(1))
    return harden(model)


@pytest.mark.parametrize("form", NEEDS)
def test_a_file_computes_what_the_model_does(model, form, tmp_path):
    need(*NEEDS[form])
    path = tmp_path / "model"
    manifest = export(model, CharTokenizer(), {}, path, form=form, seconds=0.5)
    assert manifest["model"] == "MoonshineCTC"
    assert manifest["frame_seconds"] == 384 / SAMPLE_RATE
    assert manifest["outputs"]["logits"]["shape"] == [1, model.config.num_frames(8000), 29]
    difference = compare(model, open_exported(path))
    assert difference.largest < 1e-4
    assert difference.labels == 0


def test_core_ml_takes_its_operations(model):
    need("coremltools", "stablehlo_coreml")
    inputs = {
        "audio": jax.ShapeDtypeStruct((1, 8000), jnp.float32),
        "length": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    spec = to_coreml(ctc_function(model), inputs, OUTPUTS).get_spec()
    assert [feature.name for feature in spec.description.output] == list(OUTPUTS)


def test_commands(model, tmp_path, capsys):
    folder, audio = tmp_path / "model", speech_like(2 * SAMPLE_RATE, 0)
    save_pretrained(folder, model, CharTokenizer(), {"licence": "MIT"})
    assert main(["inspect", str(folder), "--seconds=1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("MoonshineCTC, ")
    rows = [line.split() for line in printed.splitlines() if line.startswith("layers.")]
    assert [row[1] for row in rows] == ["RotarySelfAttention", "LPA"]
    assert "frames of 24 ms" in printed

    soundfile.write(tmp_path / "a.wav", audio, SAMPLE_RATE, subtype="FLOAT")
    assert main(["transcribe", str(tmp_path / "a.wav"), f"--model={folder}"]) == 0
    output = jax.jit(lambda *x: model(*x))(audio[None], jnp.array([len(audio)]))
    path = np.asarray(greedy_path(output.logits, output.lengths))[0]
    want = CharTokenizer().decode(ctc_collapse(path))
    assert len(want) > 3
    assert capsys.readouterr().out == want + "\n"
