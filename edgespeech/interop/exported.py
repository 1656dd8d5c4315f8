"""Models of a fixed length of audio in files for devices, with a manifest beside each.

StableHLO and ONNX run on most systems, LiteRT on Android, iOS and Linux, Core ML on Apple's systems alone.

An exported file takes `audio [1 t]`, float32 in [-1, 1] at 16 kHz with zeros after its end, and `length [1]`, int32,
its valid samples. It gives `logits [1 n v]` and `frames [1]`, the valid ones among them. Padding changes nothing in it,
so any audio up to the file's length can be put in.
"""

import datetime
import importlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.data.corpus import write_atomically
from edgespeech.data.tokenizer import Tokenizer
from edgespeech.errors import InputError
from edgespeech.evaluation.machine import versions
from edgespeech.inference.words import token_texts
from edgespeech.interop.coreml_export import quantize_coreml, save_coreml, to_coreml
from edgespeech.interop.ctc_model import CTCModel
from edgespeech.interop.int8 import quantize_onnx
from edgespeech.interop.int8_litert import quantize_litert
from edgespeech.interop.litert_export import load_litert, to_litert
from edgespeech.interop.onnx_export import to_onnx
from edgespeech.ops.ctc import BLANK
from edgespeech.types import SAMPLE_RATE

OUTPUTS = ("logits", "frames")
# How the name of a file ends; a Core ML package is a folder.
SUFFIXES = {
    "stablehlo": ".stablehlo",
    "onnx": ".onnx",
    "litert": ".tflite",
    "coreml": ".mlpackage",
}
FORMATS = tuple(SUFFIXES)
MOST_SAMPLES = 3600 * SAMPLE_RATE  # that a manifest may say: zeros are allocated for them

Run = Callable[
    ..., Sequence[Any]
]  # arrays to arrays, in the order of the file's inputs and outputs


class Exported(NamedTuple):
    """An exported file that is ready to run.

    Attributes:
        run: `(audio [1 t], length [1]) -> (logits [1 n v], frames [1])`.
        manifest: what is known about it.
    """

    run: Run
    manifest: dict[str, Any]

    @property
    def samples(self) -> int:
        """Samples of its input."""
        return self.manifest["inputs"]["audio"]["shape"][1]

    def logits(self, audio: np.ndarray) -> np.ndarray:
        """Logits `[n v]` of the valid frames of audio `[t]`.

        Raises:
            InputError: the audio is longer than the file's length, or the file holds a step.
        """
        if "state" in self.manifest:
            raise InputError("the file holds a step of a stream: `ExportedStream` runs it")
        if len(audio) > self.samples:
            raise InputError(
                f"audio of {len(audio)} samples for a model of {self.samples}: export it with more --seconds"
            )
        padded = np.pad(np.float32(audio), (0, self.samples - len(audio)))[None]
        logits, frames = self.run(padded, np.array([len(audio)], np.int32))
        return np.asarray(logits)[0, : int(np.asarray(frames)[0])]


def ctc_function(model: CTCModel) -> Callable[[Any, Any], tuple[Any, Any]]:
    """`(audio [b t], lengths [b]) -> (logits [b n v], frames [b])` of a model at inference."""
    graphdef, state = nnx.split(model)

    def function(audio, lengths):
        output = nnx.merge(graphdef, state)(audio, lengths)
        return output.logits, output.lengths

    return function


def export(
    model: CTCModel,
    tokenizer: Tokenizer,
    about: dict[str, Any],
    path: Path,
    *,
    form: str,
    seconds: float,
    int8: bool = False,
) -> dict[str, Any]:
    """Writes a model and its manifest, `PATH.manifest.json`; returns the manifest.

    Args:
        model: LPA with hard gates, which is how a saved one is loaded.
        tokenizer: of its vocabulary.
        about: what was saved with the model; `licence` and WER go into the manifest.
        path: of the file.
        form: one of `FORMATS`.
        seconds: of audio that it takes.
        int8: weights of 8 bits, of any form but StableHLO; see `quantize_onnx`, `quantize_litert`, `quantize_coreml`.

    Raises:
        InputError: an unknown form, int8 of StableHLO, a length without a frame, or see `to_onnx`, `to_litert` and
            `to_coreml`.
    """
    samples, n = check_choice(model, form, seconds, int8)
    shapes = {
        "audio": jax.ShapeDtypeStruct((1, samples), jnp.float32),
        "length": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    function = ctc_function(model)
    size = store(path, function, shapes, OUTPUTS, form, int8)
    manifest = {
        "file": path.name,
        "bytes": size,
        "seconds": seconds,
        "inputs": {
            "audio": {
                "shape": [1, samples],
                "dtype": "float32",
                "is": "mono in [-1, 1], zeros after its end",
            },
            "length": {"shape": [1], "dtype": "int32", "is": "valid samples of audio"},
        },
        "outputs": {
            "logits": {
                "shape": [1, n, model.config.vocab_size],
                "dtype": "float32",
                "is": "unnormalised scores of the tokens in each frame",
            },
            "frames": {"shape": [1], "dtype": "int32", "is": "valid frames of logits"},
        },
        **model_facts(model, tokenizer, about, form, int8),
    }
    write_manifest(path, manifest)
    return manifest


def model_facts(
    model: Any, tokenizer: Tokenizer, about: dict[str, Any], form: str, int8: bool
) -> dict[str, Any]:
    """What every manifest says, of whole models, of segments and of steps; arguments as of `export`."""
    return {
        "format": form,
        "bits": 8 if int8 else 32,
        "model": type(model).__name__,
        "sample_rate": SAMPLE_RATE,
        "frame_seconds": model.config.frame_seconds,
        "blank": BLANK,
        # A space begins a word; the blank and other special tokens are empty.
        "vocabulary": list(token_texts(tokenizer)),
        "licence": about.get("licence") or about.get("license") or "not stated",
        "wer": {key: value for key, value in about.items() if "wer" in key.lower()},
        "about": about,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }


def check_choice(model: CTCModel, form: str, seconds: float, int8: bool) -> tuple[int, int]:
    """Samples and frames of a file; errors as of `export`."""
    check_form(form, int8)
    samples = round(seconds * SAMPLE_RATE)
    n = int(model.config.num_frames(samples))
    if n < 1:
        raise InputError(f"{seconds:g} s of audio hold no frame of this model: give more seconds")
    return samples, n


def check_form(form: str, int8: bool) -> None:
    """Refuses what cannot be written.

    Raises:
        InputError: an unknown form, or int8 of StableHLO.
    """
    if form not in FORMATS:
        raise InputError(f"format {form!r}: choose one of {', '.join(FORMATS)}")
    if int8 and form == "stablehlo":
        raise InputError("StableHLO is written in float32 alone: choose another format for int8")


def store(
    path: Path,
    function: Callable[..., Any],
    inputs: dict[str, jax.ShapeDtypeStruct],
    outputs: Sequence[str],
    form: str,
    int8: bool = False,
) -> int:
    """Writes a function in one of `FORMATS`, whole or not at all; returns its bytes. Arguments as of `to_onnx`."""
    if form == "coreml":
        model = to_coreml(function, inputs, outputs)
        return save_coreml(quantize_coreml(model) if int8 else model, path)
    data = serialized(function, inputs, outputs, form, int8)
    write_atomically(path, lambda file: file.write(data))
    return len(data)


def serialized(
    function: Callable[..., Any],
    inputs: dict[str, jax.ShapeDtypeStruct],
    outputs: Sequence[str],
    form: str,
    int8: bool = False,
) -> bytes:
    """A function of arrays as the contents of a file, of any form but Core ML; arguments as of `to_onnx`."""
    if form == "stablehlo":
        return bytes(_export_module().export(jax.jit(function))(*inputs.values()).serialize())
    if form == "litert":
        data = to_litert(function, inputs, outputs)
        return quantize_litert(data) if int8 else data
    proto = to_onnx(function, inputs, outputs)
    return (quantize_onnx(proto) if int8 else proto).SerializeToString()


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of an exported file."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_atomically(manifest_path(path), lambda file: file.write(text.encode()))


def manifest_path(path: Path) -> Path:
    """Where the manifest of an exported file lies."""
    return path.with_name(path.name + ".manifest.json")


def open_exported(path: str | Path, threads: int | None = None) -> Exported:
    """Opens an exported file in its own runtime on the CPU: XLA, ONNX Runtime, or LiteRT.

    Args:
        path: the file; its manifest lies beside it.
        threads: of ONNX Runtime and LiteRT; XLA takes the cores that the process may use.

    Raises:
        InputError: the file or its manifest is missing or damaged, its runtime is not installed, or it is a Core ML
            package.
    """
    path = Path(path)
    manifest = read_manifest(path)
    return Exported(load_run(path, manifest["format"], threads), manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an exported file; the file itself is not opened.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        manifest = json.loads(manifest_path(path).read_text())
        form = manifest["format"]
        if form not in FORMATS:
            raise ValueError(f"format {form!r}")
        samples = manifest["inputs"]["audio"]["shape"][1]
        if type(samples) is not int or not 0 < samples <= MOST_SAMPLES:
            raise ValueError(f"audio of {samples} samples")
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename} is missing: name a file that `edgespeech export` wrote"
        ) from error
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{manifest_path(path)} is damaged ({error!r}): export again") from error
    return manifest


def load_run(path: Path, form: str, threads: int | None = None) -> Run:
    """The function in a file of one of `FORMATS`; errors and threads as of `open_exported`."""
    try:
        if form == "stablehlo":
            return _load_stablehlo(path)
        if form == "litert":
            return load_litert(path, threads)
        if form == "coreml":
            raise InputError(f"{path} is a Core ML package, which runs on Apple's systems alone")
        return _load_onnx(path, threads)
    except InputError:
        raise
    except Exception as error:  # whatever the runtime's parser throws at a damaged file
        raise InputError(f"{path} cannot be loaded ({error}): export it again") from error


def _export_module() -> Any:
    return importlib.import_module("jax.export")  # jax does not import it by itself


def _load_stablehlo(path: Path) -> Run:
    exported = _export_module().deserialize(bytearray(path.read_bytes()))
    # Compiled now: a timed first call, or its memory, is that of running.
    return jax.jit(exported.call).lower(*exported.in_avals).compile()


def _load_onnx(path: Path, threads: int | None) -> Run:
    if importlib.util.find_spec("onnxruntime") is None:
        raise InputError(f"{path} needs the package onnxruntime: pip install 'edgespeech[export]'")
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    names = [entry.name for entry in session.get_inputs()]
    return lambda *arrays: session.run(
        None, {name: np.asarray(array) for name, array in zip(names, arrays, strict=True)}
    )
