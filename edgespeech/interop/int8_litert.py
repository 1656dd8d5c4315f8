"""Weights of 8 bits for a LiteRT file, written by the package `ai-edge-quantizer`.

One scale for each output channel of linear layers and convolutions; activations are quantised at each call, one scale
a row (see `int8` for the equations). The mel filters stay in float32 here too: the bins of a power spectrum span ten
orders of magnitude.
"""

import contextlib
import importlib
import importlib.util
import io
import re
from typing import Any

from edgespeech.errors import InputError


def quantize_litert(data: bytes) -> bytes:
    """The contents of a `.tflite` file with 8-bit weights, from those of one in float32 from `to_litert`.

    Raises:
        InputError: the package ai-edge-quantizer is missing.
    """
    if importlib.util.find_spec("ai_edge_quantizer") is None:
        raise InputError(
            "int8 for LiteRT needs the package ai-edge-quantizer: pip install 'edgespeech[litert]'"
        )
    quantizer: Any = importlib.import_module("ai_edge_quantizer.quantizer")
    types: Any = importlib.import_module("ai_edge_quantizer.qtyping")
    algorithms: Any = importlib.import_module("ai_edge_quantizer.algorithm_manager").AlgorithmName
    operations = types.TFLOperationName
    job = quantizer.Quantizer(data)
    job.add_dynamic_config(".*", operations.ALL_SUPPORTED, num_bits=8)
    for name in mel_products(data):
        job.update_quantization_recipe(
            re.escape(name) + ";?$",  # it looks for this in the names of an operation's outputs
            operations.FULLY_CONNECTED,
            algorithm_key=algorithms.NO_QUANTIZE,
        )
    with contextlib.redirect_stderr(io.StringIO()):  # one of its bars knows no flag
        done = job.quantize(enable_progress_bar=False, enable_progress_report=False)
    return bytes(done.quantized_model)


def mel_products(data: bytes) -> list[str]:
    """Names of the results of matrix products that read a spectrum, or what was made of one without a product."""
    schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    builtin = schema.BuiltinOperator
    codes = [code.builtinCode for code in model.operatorCodes]
    products: list[str] = []
    for graph in model.subgraphs:
        spectra: set[int] = set()
        for operation in graph.operators:
            code = codes[operation.opcodeIndex]
            if code == builtin.RFFT2D:
                spectra.update(operation.outputs)
            elif spectra.intersection(operation.inputs):
                if code == builtin.FULLY_CONNECTED:
                    products.append(graph.tensors[operation.outputs[0]].name.decode())
                else:
                    spectra.update(operation.outputs)
    return products
