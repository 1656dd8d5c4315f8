"""Exported steps in their own runtimes against the JAX step: logits, state, words, manifests, and what is refused."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from edgespeech.cli import main
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.inference.streaming import Streamer
from edgespeech.interop.exported import manifest_path, open_exported
from edgespeech.interop.exported_stream import ExportedStream, compare_steps
from edgespeech.interop.parity import speech_like
from edgespeech.interop.pretrained import save_pretrained
from edgespeech.interop.streaming_export import export_streaming, state_path, step_function
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.models.edge_conformer_config import STRIDE
from edgespeech.nn.lpa import harden
from edgespeech.nn.lpa_config import LPAConfig
from tests.support.edge import TOKENIZER, TOY
from tests.support.modules import randomize
from tests.support.tiny import tiny_model

CONFIG = dataclasses.replace(TOY, num_layers=2, left=2)
CHANGES = {
    "attention": {},
    "attention without a past, vanilla subsampling": {
        "left": 0,
        "separable": False,
        "num_layers": 1,
    },
    "lpa": {"mixer": "lpa", "num_layers": 1},
    # Steps of more frames than the blocks of the recurrence, and a state with empty leaves.
    "causal lpa": {
        "mixer": "lpa",
        "num_layers": 1,
        "conv_reach": "causal",
        "chunk": 18,
        "lpa": LPAConfig(aperiodic=0, runs=0, periodic=2, positional=0, mean=2, local=False),
    },
}

PACKAGES = {
    "onnx": ("onnx", "onnxruntime"),
    "stablehlo": (),
    "litert": ("litert_converter", "ai_edge_litert"),
}


def make(**changes):
    """Random, its gates hard."""
    model = randomize(EdgeConformer(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)), 1)
    return harden(model) if model.config.mixer == "lpa" else model


@functools.cache
def model_and_steps(name):
    """A model, audio of six chunks, the last of them not full, and what its own step gives for each."""
    model = make(**CHANGES[name])
    chunk = model.config.chunk * STRIDE
    audio = speech_like(6 * chunk - STRIDE - 100, seed=3)
    return model, audio, list(run_in_jax(model, audio, chunk))


@pytest.fixture(scope="module")
def attention():
    """With logits of mean 0 over time: every token is the most likely one now and then."""
    model, (_, _, steps) = make(), model_and_steps("attention")
    model.head.bias[...] -= np.concatenate([logits for logits, _ in steps]).mean(0)
    return model


@pytest.fixture(scope="module")
def onnx_file(attention, tmp_path_factory):
    """The step of the model with attention."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("step") / "step.onnx"
    about = {"licence": "CC0", "test_wer": 0.25}
    export_streaming(attention, TOKENIZER, about, path, form="onnx")
    return path


def run_in_jax(model, audio, chunk):
    """Logits `[n v]` and the state after every chunk, by the model's own step."""
    step = jax.jit(lambda *x: model.step(*x))
    state = model.init_state(1)
    for start in range(0, len(audio), chunk):
        piece = audio[start : start + chunk]
        padded = np.pad(piece, (0, chunk - len(piece)))[None]
        logits, frames, state = step(padded, np.array([len(piece)]), state)
        paths, _ = jax.tree_util.tree_flatten_with_path(state)
        leaves = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in paths}
        yield np.asarray(logits)[0, : int(frames[0])], leaves


@pytest.mark.parametrize("form", ["onnx", "stablehlo", "litert"])
@pytest.mark.parametrize("name", CHANGES)
def test_steps_are_those_of_the_model(name, form, tmp_path):
    """After 1, 2, ... 6 chunks, the last of them not full: logits and every leaf of the state."""
    for package in PACKAGES[form]:
        pytest.importorskip(package)
    model, audio, steps = model_and_steps(name)
    export_streaming(model, TOKENIZER, {}, tmp_path / "step", form=form)
    stream = ExportedStream(tmp_path / "step")
    assert stream.chunk == model.config.chunk * STRIDE
    assert len(steps) == 6
    for turn, (want, leaves) in enumerate(steps):
        got = stream.step(audio[turn * stream.chunk :][: stream.chunk])
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=f"chunk {turn}")
        empty = {leaf for leaf, value in leaves.items() if not value.size}
        assert list(stream.state) == [leaf for leaf in leaves if leaf not in empty]
        for leaf, value in stream.state.items():
            assert np.asarray(value).dtype == leaves[leaf].dtype
            np.testing.assert_allclose(
                value, leaves[leaf], rtol=1e-4, atol=1e-4, err_msg=f"{leaf}, chunk {turn}"
            )
    assert len(want) == model.config.chunk - 2  # one frame and 100 samples are missing
    assert bool(empty) == (name not in ("attention", "lpa"))


def test_a_step_of_several_chunks(attention, tmp_path):
    """Twice the model's chunk: the same logits in half the calls."""
    export_streaming(attention, TOKENIZER, {}, tmp_path / "step", form="stablehlo", frames=6)
    stream = ExportedStream(tmp_path / "step")
    audio = speech_like(2 * stream.chunk, seed=4)
    want = np.concatenate([x for x, _ in run_in_jax(attention, audio, stream.chunk // 2)])
    got = np.concatenate([stream.step(half) for half in np.split(audio, 2)])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_words_are_those_of_the_streamer(attention, onnx_file):
    """For any pieces of audio; also on a second stream after `reset`."""
    stream = ExportedStream(onnx_file, endpoint_seconds=0.2)
    streamer = Streamer(attention, TOKENIZER, endpoint_seconds=0.2)
    audio = np.concatenate([speech_like(30_000, seed=5), np.zeros(9000, np.float32)])
    heard = set()
    for cuts in ([700, 701, 9000, 26_000], [20_000]):
        stream.reset()
        streamer.reset(0)
        blocks = np.split(audio, cuts)
        updates = [(stream.feed(block), streamer.feed({0: block})[0]) for block in blocks]
        updates.append((stream.close(), streamer.close(0)))
        words = []
        for got, want in updates:
            assert got.endpoint == want.endpoint
            for a, b in zip((*got.final, got.partial), (*want.final, want.partial), strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert (a.text, a.start, a.end) == (b.text, b.start, b.end)
                    assert a.stability == pytest.approx(b.stability, abs=1e-4)
            words += [word.text for word in got.final]
        heard.add(" ".join(words))
    (text,) = heard
    assert len(text.split()) >= 3


def test_the_file_needs_nothing_of_ours(onnx_file, attention):
    """Its manifest and its first state are enough to run it."""
    runtime = pytest.importorskip("onnxruntime")
    manifest = json.loads(manifest_path(onnx_file).read_text())
    session = runtime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    state = dict(np.load(onnx_file.with_name(manifest["state"]["initial"])))
    before, after = (manifest["state"][f"{side}_prefix"] for side in ("input", "output"))
    leaves = manifest["state"]["leaves"]
    inputs, outputs = session.get_inputs(), [entry.name for entry in session.get_outputs()]
    assert [entry.name for entry in inputs] == ["audio", "length", *(before + x for x in leaves)]
    assert outputs == ["logits", "frames", *(after + name for name in leaves)]
    for entry, (name, leaf) in zip(inputs[2:], leaves.items(), strict=True):
        assert entry.shape == leaf["shape"] == list(state[name].shape)
        assert leaf["dtype"] == state[name].dtype.name
    chunk = manifest["chunk_samples"]
    audio = speech_like(2 * chunk, seed=6)
    for piece, (want, _) in zip(
        np.split(audio, 2), run_in_jax(attention, audio, chunk), strict=True
    ):
        feed = {"audio": piece[None], "length": np.array([chunk], np.int32)}
        feed |= {before + name: leaf for name, leaf in state.items()}
        logits, frames, *new = session.run(None, feed)
        state = dict(zip(leaves, new, strict=True))
        np.testing.assert_allclose(logits[0, : frames[0]], want, rtol=1e-4, atol=1e-4)


def test_manifest(onnx_file):
    manifest = json.loads(manifest_path(onnx_file).read_text())
    assert manifest["chunk_samples"] == manifest["inputs"]["audio"]["shape"][1] == 3 * STRIDE
    assert manifest["lookahead_samples"] == 3 * STRIDE - 1
    assert manifest["seconds"] == 0.12
    assert manifest["sample_rate"] == 16_000
    assert manifest["frame_seconds"] == 0.04
    assert manifest["outputs"]["logits"]["shape"] == [1, 3, 5]
    assert manifest["vocabulary"] == ["", " ", "A", "B", "C"]
    assert manifest["licence"] == "CC0"
    assert manifest["wer"] == {"test_wer": 0.25}
    assert manifest["bytes"] == onnx_file.stat().st_size
    keys = manifest["state"]["leaves"]["layers.1.mixer.past.keys"]
    assert keys == {"shape": [1, 6, 2, 4], "dtype": "float32"}
    samples, norm, frames = 240, 2 * 11 + 1, 3 * 11
    layer = 2 * 6 * 8 + 1 + 2 * 8  # keys and values, seen, convolution
    assert manifest["state"]["bytes"] == 4 * (samples + norm + frames + 2 * layer)


def test_compare_steps_sees_a_difference(attention, onnx_file):
    stream = ExportedStream(onnx_file)
    same = compare_steps(attention, stream, chunks=3)
    assert same.logits.largest < 1e-4
    assert same.state < 1e-5
    bias = attention.head.bias[...]
    try:
        attention.head.bias[...] = bias + 0.5
        stream.reset()
        other = compare_steps(attention, stream, chunks=3)
    finally:
        attention.head.bias[...] = bias
    assert other.logits.largest == pytest.approx(0.5, abs=1e-4)
    stream.reset()
    stream.state["layers.0.conv"] = stream.state["layers.0.conv"] + 3.0
    assert compare_steps(attention, stream, chunks=1).logits.largest > 1e-3


def test_refusals(attention, onnx_file, tmp_path):
    give = (attention, TOKENIZER, {}, tmp_path / "x")
    with pytest.raises(InputError, match="StableHLO is written in float32 alone"):
        export_streaming(*give, form="stablehlo", int8=True)
    with pytest.raises(InputError, match="format 'tflite': choose one of"):
        export_streaming(*give, form="tflite")
    with pytest.raises(InputError, match="a step of 4 frames for a model with chunks of 3"):
        export_streaming(*give, form="onnx", frames=4)
    half = EdgeConformer(dataclasses.replace(CONFIG, dtype="float16"), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="the model computes in float16"):
        export_streaming(half, *give[1:], form="onnx")
    with pytest.raises(InputError, match="a step of a stream: `ExportedStream` runs it"):
        open_exported(onnx_file).logits(np.zeros(100))
    stream = ExportedStream(onnx_file)
    with pytest.raises(InputError, match="1921 samples for a step of 1920"):
        stream.step(np.zeros(1921))
    with pytest.raises(InputError, match=r"float64 of shape \[2, 2\]"):
        stream.feed(np.zeros((2, 2)))
    with pytest.raises(InputError, match="or hold NaN"):
        stream.feed(np.array([0.0, np.nan]))
    stream.close()
    for call in (stream.close, lambda: stream.feed(np.zeros(5))):
        with pytest.raises(InputError, match="the stream is closed"):
            call()
    with pytest.raises(InputError, match="endpoint_seconds is 0"):
        ExportedStream(onnx_file, endpoint_seconds=0)
    copy = tmp_path / "step.onnx"
    copy.write_bytes(onnx_file.read_bytes())
    text = manifest_path(onnx_file).read_text()
    manifest_path(copy).write_text(text)
    with pytest.raises(InputError, match=r"state.npz is missing or damaged"):
        ExportedStream(copy)
    for damaged in (b"no", b"", state_path(onnx_file).read_bytes()[:-30]):
        state_path(copy).write_bytes(damaged)
        with pytest.raises(InputError, match=r"state.npz is missing or damaged"):
            ExportedStream(copy)
    manifest_path(copy).write_text(text.replace('"state"', '"other"'))
    with pytest.raises(InputError, match="takes whole recordings"):
        ExportedStream(copy)


def test_command(attention, tmp_path, capsys):
    """A shorter chunk than the model's own, checked against JAX, and timed."""
    save_pretrained(tmp_path / "model", attention, TOKENIZER, {"licence": "CC0"})
    export = ["export", "--streaming", "--format=stablehlo", f"--output={tmp_path}"]
    assert main([*export, f"--model={tmp_path / 'model'}", "--chunk=2", "--left=1"]) == 0
    printed = capsys.readouterr().out
    assert "0.0% of the frames have another label" in printed
    manifest = json.loads((tmp_path / "step.stablehlo.manifest.json").read_text())
    assert manifest["chunk_samples"] == 2 * STRIDE
    assert manifest["state"]["leaves"]["layers.0.mixer.past.keys"]["shape"] == [1, 2, 2, 4]
    assert manifest["difference_from_jax"]["largest"] < 1e-4
    assert manifest["difference_from_jax"]["state"] < 1e-5

    rows = tmp_path / "rows.json"
    step = str(tmp_path / "step.stablehlo")
    assert main(["bench", step, "--threads=1", "--repeats=2", f"--output={rows}"]) == 0
    (row,) = json.loads(rows.read_text())["rows"]
    assert row["real_time_factor"] == pytest.approx(row["p50_ms"] / 80)

    save_pretrained(tmp_path / "other", tiny_model(), CharTokenizer(), {})
    assert main([*export, f"--model={tmp_path / 'other'}"]) == 2
    assert "is a Wav2Vec2, which does not stream" in capsys.readouterr().err
    assert main([*export, f"--model={tmp_path / 'model'}", "--chunk=0"]) == 2
    assert "set_chunks got size 0" in capsys.readouterr().err


def test_step_function_closes_over_the_model_alone(attention):
    """Its first state is that of the model, not zeros."""
    initial = step_function(attention).initial
    want = np.asarray(attention.init_state(1).features.norm)
    assert want.any()
    np.testing.assert_array_equal(initial["features.norm"], want)
    assert not any(leaf.any() for name, leaf in initial.items() if name != "features.norm")
