"""The wheel's weights: against its own graphs run in NumPy, and its own library on its own recording."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.data.audio import read_audio
from edgespeech.errors import InputError
from edgespeech.inference.transcribe import Transcriber
from edgespeech.interop import moonshine_wheel
from edgespeech.interop.hf_moonshine import hf_names
from edgespeech.interop.moonshine_wheel import DECODER, ENCODER, graph_names, load_pretrained_wheel
from edgespeech.interop.ort_format import read_ort
from edgespeech.interop.tensors import named_params
from tests.support.onnx_graph import run_graph

SPEC = importlib.util.find_spec("moonshine_cpp")
PACKAGE = Path(SPEC.origin).parent if SPEC is not None and SPEC.origin else None
needs_wheel = pytest.mark.skipif(PACKAGE is None, reason="needs the extra moonshine")
TEXT = "Ever tried ever failed, no matter try again fail again fail better."


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained_wheel()


@pytest.fixture(scope="module")
def recording():
    return read_audio(PACKAGE / "test-data" / "beckett.wav").samples


# --- without the wheel


def test_every_parameter_has_its_node():
    table = graph_names(8, 8)
    assert table.keys() == hf_names(8, 8).keys()
    assert len(set(table.values())) == len(table)
    assert table["front_end.kernels.0"] == ("/conv1/Conv", 0)
    assert table["front_end.biases.0"] == ("/conv2/Conv", 1)
    assert table["front_end.norm.scale"] == ("/groupnorm/Mul", 0)
    assert table["front_end.norm.bias"] == ("/groupnorm/Add", 0)
    assert table["layers.3.mixer.out_proj.kernel"] == ("/layers.3/self_attn/dense/MatMul", 0)
    assert table["layers.3.ffn.expand.bias"] == ("/layers.3/mlp/fc1/Add", 0)
    assert table["embedding"] == ("/model/decoder/embed_tokens/Gather", 0)
    decoder = "/model/decoder/layers.7"
    assert table["decoder_layers.7.ffn.contract.kernel"] == (f"{decoder}/mlp/down_proj/MatMul", 0)
    assert table["decoder_layers.7.ffn_norm.scale"] == (f"{decoder}/final_layernorm/Mul", 0)


def test_other_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"encoder_model.ort cannot be read .*moonshine-cpp==0.1.4"
    ):
        load_pretrained_wheel(tmp_path)
    (tmp_path / ENCODER).write_bytes(b"other")
    with pytest.raises(InputError, match=r"SHA-256 d9298a10d1b07358.* and not 9d1a19e044cbf89a"):
        load_pretrained_wheel(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed: pip install 'edgespeech\[moonshine\]'"):
        moonshine_wheel.load_pretrained_wheel()


# --- with the wheel


@needs_wheel
def test_weights_are_the_dequantised_ones(loaded):
    graph = read_ort(PACKAGE / "models" / "base-en" / ENCODER)
    node = next(n for n in graph.nodes if n.name == "/layers.2/mlp/fc1/MatMul")
    name = node.inputs[1].removesuffix("_add_tensor")
    quantised, scale, zero = (
        graph.initializers[f"{name}_{part}"] for part in ("quantized", "scale", "zero_point")
    )
    assert quantised.dtype == np.int8
    wanted = scale * quantised.astype(np.float32) + zero
    kernel = named_params(loaded.model)["layers.2.ffn.expand.kernel"][...]
    np.testing.assert_array_equal(kernel, wanted)
    assert all(p[...].dtype == jnp.float32 for p in named_params(loaded.model).values())


@needs_wheel
def test_outputs_are_those_of_the_wheels_graphs(loaded, recording):
    audio = recording[None, 8_000:20_000]
    tokens = np.array([[1, 450, 17, 2999]])
    folder = PACKAGE / "models" / "base-en"
    memory = run_graph(read_ort(folder / ENCODER), input_values=audio)["last_hidden_state"]
    wanted = run_graph(
        read_ort(folder / DECODER),
        input_ids=tokens,
        encoder_hidden_states=memory,
        use_cache_branch=np.array([False]),
    )["logits"]
    graphdef, state = nnx.split(loaded.model)
    buffer = np.pad(audio, ((0, 0), (0, 4_000)), constant_values=np.nan)
    output = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))(
        state, buffer, jnp.array([12_000]), tokens, jnp.array([4])
    )
    n = memory.shape[1]
    assert output.lengths[0] == n
    np.testing.assert_allclose(output.memory[:, :n], memory, atol=1e-3)
    np.testing.assert_allclose(output.logits, wanted, atol=5e-3)
    assert np.abs(wanted).max() > 5


@needs_wheel
def test_text_is_the_one_of_the_wheels_library(loaded, recording):
    transcribe = Transcriber(*loaded, batch_size=1, tokens_per_second=13)
    assert transcribe([recording]) == [TEXT]
    # In a process of its own: the library is compiled for processors with AVX-512, and others stop it.
    program = (
        "from moonshine_cpp.moonshine_cpp import MoonshineModel\n"
        f"print(MoonshineModel().transcribe_wav({str(PACKAGE / 'test-data' / 'beckett.wav')!r}))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"the wheel's library does not run here: {found.stderr[-200:]}")
    assert found.stdout.strip() == TEXT
