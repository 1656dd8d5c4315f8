"""Exported files in their own runtimes against JAX: models of every kind, manifests, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.conversion.mixers import control_factory, lpa_factory
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.interop.exported import (
    OUTPUTS,
    ctc_function,
    export,
    manifest_path,
    open_exported,
)
from edgespeech.interop.exported_exits import export_exits, run_exits
from edgespeech.interop.onnx_export import to_onnx
from edgespeech.interop.parity import compare, difference, evaluations, speech_like
from edgespeech.nn.lpa import LPAConfig, harden
from tests.support.modules import randomize
from tests.support.tiny import tiny_model
from tests.support.tiny_exits import exit_model

ALL_KINDS = LPAConfig(
    octaves=1,
    taps=1,
    aperiodic=2,
    runs=2,
    periodic=1,
    positional=1,
    mean=1,
    kernel_size=3,
    local_kernel_size=5,
)
CONTENT = LPAConfig(aperiodic=1, periodic=1, positional=0, kernel_size=3, readout="content")


def hybrid(*configs):
    """A layer of each LPA, the gates hard."""
    model = tiny_model(seed=4)
    for index, config in enumerate(configs):
        model.layers[index].mixer = lpa_factory(config)(model.layers[index].mixer, nnx.Rngs(index))
    return harden(randomize(model, 1, 0.2))


def waveform_model():
    model = tiny_model(
        seed=3, front_end="waveform", norm_first=False, position_kernel=4, position_groups=4
    )
    model.layers[1].mixer = control_factory("sliding_window", 3)(model.layers[1].mixer, nnx.Rngs(0))
    return randomize(model, 2, 0.1)


MODELS = {
    "attention": (lambda: randomize(tiny_model(seed=3), 1, 0.2), 1.0),
    "hybrid": (lambda: hybrid(ALL_KINDS, CONTENT, LPAConfig.local_only()), 1.0),
    # 274 frames: two chunks of the front end, and attention in blocks.
    "waveform": (waveform_model, 5.5),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    """Audio of the whole length, and of half of it with noise behind it: padding changes nothing."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    make, seconds = MODELS[name]
    function = ctc_function(make())
    samples = round(16_000 * seconds)
    shapes = (
        jax.ShapeDtypeStruct((1, samples), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    model = to_onnx(function, {"audio": shapes[0], "length": shapes[1]}, OUTPUTS)
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    reference = jax.jit(function)
    audio = speech_like(samples, seed=5)[None]
    for length in (samples, samples // 2):
        feed = {"audio": audio, "length": np.array([length], np.int32)}
        logits, frames = session.run(list(OUTPUTS), feed)
        want, want_frames = map(np.asarray, reference(*feed.values()))
        np.testing.assert_array_equal(frames, want_frames)
        n = frames[0]
        np.testing.assert_allclose(logits[0, :n], want[0, :n], rtol=1e-4, atol=1e-4)


ABOUT = {"licence": "CC0", "test_wer": 0.25, "data": "tones"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A hybrid in a StableHLO file of 1 s: its folder and the model."""
    folder = tmp_path_factory.mktemp("exported")
    model = hybrid(ALL_KINDS)
    export(model, CharTokenizer(), ABOUT, folder / "model.stablehlo", form="stablehlo", seconds=1.0)
    return folder, model


def test_stablehlo(exported):
    folder, model = exported
    opened = open_exported(folder / "model.stablehlo")
    gap = compare(model, opened)
    assert gap.largest < 1e-4
    assert gap.labels == 0
    assert opened.logits(speech_like(9000, seed=2)).shape[0] == model.config.num_frames(9000)
    with pytest.raises(InputError, match="audio of 16001 samples for a model of 16000"):
        opened.logits(np.zeros(16_001))


def test_manifest(exported):
    folder, model = exported
    path = folder / "model.stablehlo"
    manifest = json.loads(manifest_path(path).read_text())
    assert manifest["inputs"]["audio"]["shape"] == [1, 16_000]
    n = model.config.num_frames(16_000)
    assert manifest["outputs"]["logits"]["shape"] == [1, n, CharTokenizer().vocab_size]
    assert manifest["bytes"] == path.stat().st_size
    assert manifest["licence"] == "CC0"
    assert manifest["wer"] == {"test_wer": 0.25}
    assert manifest["vocabulary"][:4] == ["", " ", "'", "A"]
    assert manifest["frame_seconds"] == model.config.frame_seconds == 0.08


def test_difference_and_evaluations(tmp_path):
    wanted = np.array([[3.0, 0.0], [0.0, 4.0]])
    gap = difference(wanted, wanted + np.array([[0.0, 0.0], [6.0, 0.0]]))
    assert gap == (6.0, pytest.approx(6 / 5), 0.5)
    (tmp_path / "evaluations").mkdir()
    score = {"score": {"wer": 0.1, "ci": [0.05, 0.15], "cer": 0.02}}
    (tmp_path / "evaluations" / "folder_test.json").write_text(json.dumps(score))
    assert evaluations(tmp_path) == {"folder_test": {"wer": 0.1, "ci": [0.05, 0.15]}}


def test_refusals(exported, tmp_path):
    folder, model = exported
    give = (model, CharTokenizer(), {}, tmp_path / "x")
    with pytest.raises(InputError, match="choose one of stablehlo, onnx, litert, coreml"):
        export(*give, form="tflite", seconds=1.0)
    with pytest.raises(InputError, match="float32 alone: choose another format for int8"):
        export(*give, form="stablehlo", seconds=1.0, int8=True)
    with pytest.raises(InputError, match="hold no frame"):
        export(*give, form="stablehlo", seconds=0.01)
    with pytest.raises(InputError, match="name a file that `edgespeech export` wrote"):
        open_exported(tmp_path / "model.onnx")
    broken = tmp_path / "model.stablehlo"
    manifest_path(broken).write_text(manifest_path(folder / "model.stablehlo").read_text())
    broken.write_bytes((folder / "model.stablehlo").read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be loaded"):
        open_exported(broken)
    manifest_path(broken).write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        open_exported(broken)


def test_one_file_for_each_exit(tmp_path):
    """In turn they give the logits of every exit."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = exit_model(vocab_size=CharTokenizer().vocab_size, num_exits=2)
    manifest = export_exits(model, CharTokenizer(), {}, tmp_path, form="onnx", seconds=0.5)
    assert [part["file"] for part in manifest["segments"]] == [
        f"{name}.onnx" for name in ("embed", "exit_1", "exit_2")
    ]
    audio = speech_like(6000, seed=3)
    want = jax.jit(lambda *inputs: model(*inputs).exit_logits)(audio[None], np.array([6000]))
    for found, logits in zip(run_exits(tmp_path, audio), want, strict=True):
        assert found.shape == logits.shape[1:]
        np.testing.assert_allclose(found, logits[0], atol=1e-4)
    with pytest.raises(InputError, match="audio of 8001 samples for a model of 8000"):
        next(run_exits(tmp_path, np.zeros(8001)))
