"""Other implementations to time ours against, on the CPU: transformers (PyTorch), ONNX Runtime, SpeechBrain.

Each is loaded with random weights, which change no time, and runs batch 1 in float32 without gradients. They take the
waveform as it is: scaling it to zero mean and unit variance, which our model does itself, is left out of their time.
"""

import functools
import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgespeech.evaluation.latency import Load, Prepare
from edgespeech.evaluation.latency_sepformer import load_speechbrain
from edgespeech.interop.hf_layout import write_fields
from edgespeech.models.sepformer import SepFormerConfig
from edgespeech.models.wav2vec2 import Wav2Vec2Config

# The packages that decide a peer's times.
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "speechbrain")


def random_transformers_model(config: Wav2Vec2Config, attention: str) -> Any:
    """`transformers.Wav2Vec2ForCTC` of our sizes in inference mode, its weights drawn from a fixed seed.

    Args:
        config: with the waveform front end.
        attention: upstream's `attn_implementation`, "eager" or "sdpa".
    """
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    hf_config = transformers.Wav2Vec2Config.from_dict(
        write_fields(config), attn_implementation=attention
    )
    torch.manual_seed(0)
    return transformers.Wav2Vec2ForCTC(hf_config).eval()


def load_transformers(config: Wav2Vec2Config, threads: int, attention: str) -> Prepare:
    """The PyTorch model: calls return logits `[1 n v]`.

    Args:
        config: with the waveform front end.
        threads: of PyTorch's pool, for the whole process.
        attention: "eager", the n x n matrix in memory, or "sdpa", PyTorch's fused kernel.
    """
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    model = random_transformers_model(config, attention)

    def prepare(audio: np.ndarray) -> Callable[[], Any]:
        samples = torch.from_numpy(audio)

        def call():
            with torch.inference_mode():
                return model(samples).logits

        return call

    return prepare


def load_onnxruntime(config: Wav2Vec2Config, threads: int) -> Prepare:
    """The PyTorch model in ONNX Runtime: one graph for all lengths; calls return logits `[1 n v]`.

    Args:
        config: with the waveform front end.
        threads: of the session.
    """
    torch, runtime = map(importlib.import_module, ("torch", "onnxruntime"))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # Between calls its threads would go on spinning on the cores of the next contender.
    options.add_session_config_entry("session.force_spinning_stop", "1")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = random_transformers_model(config, "eager")

        def forward(self, audio):
            return self.model(audio).logits

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of the tracer: our tests compare other lengths than the traced one
        path = Path(folder) / "model.onnx"
        # The tracing exporter needs no package beside onnx.
        torch.onnx.export(
            Logits().eval(),
            (torch.zeros(1, 16_000),),
            path,
            dynamo=False,
            input_names=["audio"],
            output_names=["logits"],
            dynamic_axes={"audio": {1: "t"}, "logits": {1: "n"}},
        )
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda audio: lambda: session.run(["logits"], {"audio": audio})[0]


class Peer(NamedTuple):
    """Another implementation.

    Attributes:
        packages: what it needs installed.
        load: from (config, threads).
        family: the configuration of the models it has, with the waveform front end where there are several.
        has: what it has, for the note that it is absent.
    """

    packages: tuple[str, ...]
    load: Callable[..., Prepare]
    family: type
    has: str


WAV2VEC2 = "wav2vec2 with the waveform front end"
PEERS = {
    "transformers_eager": Peer(
        ("torch", "transformers"),
        functools.partial(load_transformers, attention="eager"),
        Wav2Vec2Config,
        WAV2VEC2,
    ),
    "transformers_sdpa": Peer(
        ("torch", "transformers"),
        functools.partial(load_transformers, attention="sdpa"),
        Wav2Vec2Config,
        WAV2VEC2,
    ),
    "onnxruntime": Peer(
        ("torch", "transformers", "onnx", "onnxruntime"), load_onnxruntime, Wav2Vec2Config, WAV2VEC2
    ),
    "speechbrain": Peer(
        ("torch", "speechbrain"),
        load_speechbrain,
        SepFormerConfig,
        "SepFormer",
    ),
}


def find_peers(config: Any, threads: int) -> tuple[dict[str, Load], list[str]]:
    """The peers that can run this model here, and a sentence on each of its family that cannot."""
    found: dict[str, Load] = {}
    absent: list[str] = []
    for name, peer in PEERS.items():
        missing = [
            package for package in peer.packages if importlib.util.find_spec(package) is None
        ]
        if not isinstance(config, peer.family):
            continue
        if getattr(config, "front_end", "waveform") != "waveform":
            absent.append(f"{name} is absent: it has {peer.has} alone")
        elif missing:
            absent.append(f"{name} is absent: install {', '.join(missing)}")
        else:
            found[name] = functools.partial(peer.load, config, threads)
    return found, absent
