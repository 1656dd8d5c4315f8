"""JAX functions as LiteRT (TensorFlow Lite) files, and how they run: no TensorFlow, no torch.

`jax.export` writes StableHLO, the package `litert-converter` lowers it to LiteRT's operations, and the interpreter of
`ai-edge-litert` runs them, on the CPU through XNNPACK. Shapes are fixed, loops of known length are unrolled.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from edgespeech.errors import InputError
from edgespeech.interop.rewrite import unrolled

SIGNATURE = "serving_default"  # what LiteRT's own tools look for


def to_litert(
    function: Callable[..., Any],
    inputs: dict[str, jax.ShapeDtypeStruct],
    outputs: Sequence[str],
) -> bytes:
    """The contents of a `.tflite` file; arguments as of `to_onnx`.

    Raises:
        InputError: the package litert-converter is missing, or it cannot lower an operation.
    """
    if importlib.util.find_spec("litert_converter") is None:
        raise InputError(
            "LiteRT export needs the package litert-converter: pip install 'edgespeech[litert]'"
        )
    api: Any = importlib.import_module("litert_converter.converter_api_ext")
    ir: Any = importlib.import_module("litert_converter.mlir.ir")
    passes: Any = importlib.import_module("litert_converter.mlir.passmanager")
    stablehlo: Any = importlib.import_module("litert_converter.mlir.dialects.stablehlo")
    # Otherwise JAX leaves an input out that no output depends on, and the names no longer fit.
    jitted = jax.jit(unrolled(function), keep_unused=True)
    program = importlib.import_module("jax.export").export(jitted)(*inputs.values())
    context = ir.Context()
    api.prepare_mlir_context(context)
    with context:
        # Deserialised, not parsed: the converter's passes crash on the portable form of the operations.
        module = stablehlo.deserialize_portable_artifact(context, program.mlir_module_serialized)
        try:
            api.set_signature(module.operation, SIGNATURE, list(inputs), list(outputs))
            api.run_convert_to_tfl_passes(module, passes.PassManager(), api.ConvertToTFLConfig())
            return api.export_flatbuffer_to_bytes(module.operation)
        except (ValueError, RuntimeError, ir.MLIRError) as error:
            text = str(error).strip().split("\n")[0]
            if text.endswith(":"):  # it does not say what it cannot write
                text += " " + ", ".join(_not_written(ir, module))
            raise InputError(f"LiteRT export: the converter refuses the model ({text})") from error


def _not_written(ir: Any, module: Any) -> list[str]:
    """Operations that are not LiteRT's, and loops and branches, which the converter cannot write into a file."""
    found = set()

    def visit(operation):
        dialect, _, name = operation.name.partition(".")
        if dialect not in ("tfl", "arith", "func", "builtin") or name in ("while", "if"):
            found.add(operation.name)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return sorted(found)


def load_litert(path: Path, threads: int | None = None) -> Callable[..., list[np.ndarray]]:
    """The function in a `.tflite` file, arrays to arrays, in the order of its inputs and outputs.

    Args:
        path: of the file.
        threads: of the interpreter; None: its own choice.

    Raises:
        InputError: the package ai-edge-litert is missing.
    """
    if importlib.util.find_spec("ai_edge_litert") is None:
        raise InputError(
            f"{path} needs the package ai-edge-litert: pip install 'edgespeech[litert]'"
        )
    runtime: Any = importlib.import_module("ai_edge_litert.interpreter")
    interpreter = runtime.Interpreter(model_path=str(path), num_threads=threads)
    interpreter.allocate_tensors()
    inputs = [entry["index"] for entry in interpreter.get_input_details()]
    outputs = [entry["index"] for entry in interpreter.get_output_details()]

    def run(*arrays):
        for index, array in zip(inputs, arrays, strict=True):
            interpreter.set_tensor(index, np.asarray(array))
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in outputs]

    return run
