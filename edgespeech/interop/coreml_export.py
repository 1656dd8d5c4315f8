"""JAX functions as Core ML packages (ML programs in float32, for iOS 18 and macOS 15 or newer).

`jax.export` writes StableHLO, and the packages `stablehlo-coreml` and `coremltools` convert it, on any system. Running
a package takes an Apple system. Shapes are fixed, loops of known length are unrolled.
"""

import importlib
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from edgespeech.errors import InputError
from edgespeech.interop.int8 import LEAST_ELEMENTS
from edgespeech.interop.rewrite import unrolled


def to_coreml(
    function: Callable[..., Any],
    inputs: dict[str, jax.ShapeDtypeStruct],
    outputs: Sequence[str],
) -> Any:
    """The `coremltools.models.MLModel` of a function; arguments as of `to_onnx`, names as of `coreml_name`.

    Raises:
        InputError: a package is missing, or an operation of the model cannot be converted.
    """
    tools, converter = _packages()
    program = to_mil(function, inputs)
    try:
        model = tools.convert(
            program,
            source="milinternal",
            minimum_deployment_target=tools.target.iOS18,
            # The device lowers the precision where it likes; float16 would cut the power spectrum off.
            compute_precision=tools.precision.FLOAT32,
            pass_pipeline=converter.build_pass_pipeline(),
            skip_model_load=True,
        )
    except (ValueError, NotImplementedError, RuntimeError, TypeError) as error:
        raise _refused(error) from error
    spec = model.get_spec()
    for features, names in (
        (spec.description.input, list(inputs)),
        (spec.description.output, outputs),
    ):
        for old, new in zip([feature.name for feature in features], names, strict=True):
            if old != new:
                tools.utils.rename_feature(spec, old, coreml_name(new))
    return tools.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True)


def coreml_name(name: str) -> str:
    """The name of an input or output in a package, where dots may not stand."""
    return name.replace(".", "_")


def to_mil(function: Callable[..., Any], inputs: dict[str, jax.ShapeDtypeStruct]) -> Any:
    """The function in coremltools' own language, not optimised; arguments and errors as of `to_coreml`."""
    tools, converter = _packages()
    ir: Any = importlib.import_module("jaxlib.mlir.ir")
    mlir: Any = importlib.import_module("jax.interpreters.mlir")
    # Otherwise JAX leaves an input out that no output depends on, and the names no longer fit.
    jitted = jax.jit(unrolled(function, coreml=True), keep_unused=True)
    exported = importlib.import_module("jax.export").export(jitted)(*inputs.values())
    module = ir.Module.parse(exported.mlir_module(), context=mlir.make_ir_context())
    try:
        return converter.convert(module, minimum_deployment_target=tools.target.iOS18)
    except (ValueError, NotImplementedError, RuntimeError, TypeError) as error:
        raise _refused(error) from error


def quantize_coreml(model: Any) -> Any:
    """The model of `to_coreml` with 8-bit weights, one scale for each output channel; it computes in float32.

    Tensors of fewer than `LEAST_ELEMENTS` stay. As in `quantize_weights`, `w ~ s q` with `s = max |w| / 127`.
    """
    optimize: Any = importlib.import_module("coremltools.optimize.coreml")
    how = optimize.OpLinearQuantizerConfig(
        mode="linear_symmetric",
        dtype="int8",
        granularity="per_channel",
        weight_threshold=LEAST_ELEMENTS,
    )
    return optimize.linear_quantize_weights(
        model, config=optimize.OptimizationConfig(global_config=how)
    )


def save_coreml(model: Any, path: Path) -> int:
    """Writes a package, a folder that must end in `.mlpackage`, whole or not at all; returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        package = Path(folder) / path.name
        model.save(str(package))
        if path.exists():
            shutil.rmtree(path)
        package.rename(path)
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _packages() -> tuple[Any, Any]:
    """Coremltools and stablehlo_coreml."""
    found = []
    for name in ("coremltools", "stablehlo_coreml"):
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"Core ML export needs the package {name}: pip install 'edgespeech[coreml]'"
            )
        found.append(importlib.import_module(name))
    return found[0], found[1]


def _refused(error: Exception) -> InputError:
    return InputError(f"Core ML export: the converter refuses the model ({error})")
