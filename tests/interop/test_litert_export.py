"""Exported `.tflite` files in LiteRT's interpreter against JAX: whole models, segments of exits, and the commands."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from edgespeech.cli import main
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.interop.exported import (
    OUTPUTS,
    ctc_function,
    export,
    manifest_path,
    open_exported,
)
from edgespeech.interop.exported_exits import MANIFEST, export_exits, run_exits
from edgespeech.interop.litert_export import load_litert, to_litert
from edgespeech.interop.parity import compare, speech_like
from edgespeech.interop.pretrained import save_pretrained
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.models.edge_conformer_config import EdgeConformerConfig
from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits
from edgespeech.nn.lpa import LPAConfig, harden
from edgespeech.nn.streaming_lpa import STREAMING_CONFIG
from tests.interop.test_export import ALL_KINDS, CONTENT, hybrid, waveform_model
from tests.support.modules import randomize
from tests.support.tiny import tiny_model
from tests.support.tiny_exits import exit_model

pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_converter")


def edge_model():
    """A running norm, which starts with a row that is added, and causal pulses, whose loop is unrolled."""
    sizes = {"num_mels": 11, "width": 8, "num_layers": 1, "num_heads": 2, "ffn_width": 8}
    config = dataclasses.replace(
        EdgeConformerConfig.tiny(), mixer="lpa", lpa=STREAMING_CONFIG, conv_kernel=5, **sizes
    )
    return harden(randomize(EdgeConformer(config, rngs=nnx.Rngs(0)), 1, 0.1))


MODELS = {
    "attention": (lambda: randomize(tiny_model(seed=3, num_layers=2), 1, 0.2), 0.8),
    "hybrid": (lambda: hybrid(ALL_KINDS, CONTENT, LPAConfig.local_only()), 0.8),
    "edge": (edge_model, 0.8),
    # 274 frames: two chunks of the front end, and attention in blocks: loops that are unrolled.
    "waveform": (waveform_model, 5.5),
}


def run_graph(tmp_path, function, **arrays):
    """What the interpreter makes of a function's file."""
    shapes = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()
    }
    path = tmp_path / "graph.tflite"
    path.write_bytes(to_litert(function, shapes, ["y"]))
    return load_litert(path, threads=1)(*arrays.values())


@pytest.mark.parametrize("name", MODELS)
def test_models(name, tmp_path):
    """Audio of the whole length, and of half of it with noise behind it: padding changes nothing."""
    make, seconds = MODELS[name]
    function = ctc_function(make())
    samples = round(16_000 * seconds)
    shapes = {
        "audio": jax.ShapeDtypeStruct((1, samples), jnp.float32),
        "length": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    path = tmp_path / "model.tflite"
    path.write_bytes(to_litert(function, shapes, OUTPUTS))
    run, reference = load_litert(path, threads=1), jax.jit(function)
    audio = speech_like(samples, seed=5)[None]
    for length in (samples, samples // 2):
        arrays = audio, np.array([length], np.int32)
        logits, frames = run(*arrays)
        want, want_frames = map(np.asarray, reference(*arrays))
        np.testing.assert_array_equal(frames, want_frames)
        n = frames[0]
        np.testing.assert_allclose(logits[0, :n], want[0, :n], rtol=1e-4, atol=1e-4)


def test_inputs_keep_their_order_and_an_unused_one_its_place(tmp_path):
    b, a = np.float32([[1, 2]]), np.int32([3])
    (y,) = run_graph(tmp_path, lambda b, a, c: 2 * b - a[0], b=b, a=a, c=b)
    np.testing.assert_array_equal(y, [[-1, 1]])


def test_what_cannot_be_converted_is_refused(tmp_path):
    def until_large(x):
        return lax.while_loop(lambda c: c.sum() < 9, lambda c: 2 * c + 1, x)

    with pytest.raises(InputError, match=r"the converter refuses the model \(.*tfl.while"):
        run_graph(tmp_path, until_large, x=np.float32([1, 2]))


def test_manifest_and_damage(tmp_path):
    """Through the functions that the command line calls."""
    model = randomize(tiny_model(seed=2, num_layers=1), 1, 0.2)
    path = tmp_path / "model.tflite"
    manifest = export(model, CharTokenizer(), {}, path, form="litert", seconds=0.5)
    assert manifest == json.loads(manifest_path(path).read_text())
    assert manifest["format"] == "litert"
    assert manifest["bytes"] == path.stat().st_size
    assert manifest["inputs"]["audio"]["shape"] == [1, 8000]
    gap = compare(model, open_exported(path, threads=1))
    assert gap.largest < 1e-4
    assert gap.labels == 0
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be loaded"):
        open_exported(path)


def test_one_file_for_each_exit_of_an_encoder(tmp_path):
    """Of a wav2vec2 with a shared head; the command below has a Splitformer."""
    vocabulary = CharTokenizer().vocab_size
    encoder = randomize(tiny_model(seed=1, num_layers=2, vocab_size=vocabulary), 1, 0.2)
    model = Wav2Vec2Exits(encoder, (1, 2))
    manifest = export_exits(model, CharTokenizer(), {}, tmp_path, form="litert", seconds=0.5)
    assert [part["file"] for part in manifest["segments"]] == [
        f"{name}.tflite" for name in ("embed", "exit_1", "exit_2")
    ]
    audio = speech_like(6000, seed=3)
    want = jax.jit(lambda *inputs: model(*inputs).exit_logits)(audio[None], np.array([6000]))
    for found, logits in zip(run_exits(tmp_path, audio), want, strict=True):
        assert found.shape == logits.shape[1:]
        np.testing.assert_allclose(found, logits[0], atol=1e-4)


def test_commands(tmp_path, capsys):
    """Exits from a saved model, compared on the way; then the time of a segment's whole model."""
    model = exit_model(vocab_size=CharTokenizer().vocab_size, num_exits=2)
    save_pretrained(tmp_path / "saved", model, CharTokenizer(), {})
    options = [f"--model={tmp_path / 'saved'}", "--format=litert", "--seconds=0.5"]
    exits = tmp_path / "exits"
    assert main(["export", *options, "--exits", f"--output={exits}"]) == 0
    assert "logits of all exits differ from JAX by" in capsys.readouterr().out
    manifest = json.loads((exits / MANIFEST).read_text())
    assert len(manifest["difference_from_jax"]) == 2
    assert all(gap["largest"] < 1e-4 for gap in manifest["difference_from_jax"])
    assert manifest["segments"][1] == {
        "file": "exit_1.tflite",
        "bytes": (exits / "exit_1.tflite").stat().st_size,
        "inputs": ["x", "frames"],
        "outputs": ["next_x", "logits"],
    }

    assert main(["export", *options, f"--output={tmp_path}"]) == 0
    assert "0.0% of the frames have another label" in capsys.readouterr().out
    rows = tmp_path / "rows.json"
    exported = str(tmp_path / "model.tflite")
    assert main(["bench", exported, "--threads=1", "--repeats=2", f"--output={rows}"]) == 0
    (row,) = json.loads(rows.read_text())["rows"]
    assert row["file"] == exported
    assert row["p50_ms"] > 0
    assert row["real_time_factor"] == pytest.approx(row["p50_ms"] / 500)
