"""Write a model into a file for a device: StableHLO, ONNX, LiteRT or Core ML, with a manifest."""

import argparse
from pathlib import Path
from typing import Any

from edgespeech.errors import InputError

FORMATS = ("stablehlo", "onnx", "litert", "coreml")
# Largest difference of logits between the file and JAX that passes for float rounding.
TOLERANCE = 1e-3
NOT_RUN = "converted, not run: Core ML runs on Apple's systems alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--model", required=True, help="folder of a saved model with a CTC head")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="longest audio that it takes (default: 10)"
    )
    parser.add_argument(
        "--exits", action="store_true", help="a file for each segment of a model with exits"
    )
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="the step of an edge Conformer, its state in and out",
    )
    parser.add_argument(
        "--chunk", type=int, help="frames of 40 ms in a step (--streaming; default: the model's)"
    )
    parser.add_argument(
        "--left",
        type=int,
        help="chunks that attention sees before (--streaming; default: as above)",
    )
    parser.add_argument("--int8", action="store_true", help="weights of 8 bits (not StableHLO)")
    parser.add_argument(
        "--output", metavar="DIR", default="exported", help="folder of the file (default: exported)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Exports, opens the file in its own runtime and compares it with JAX; a Core ML package is not opened."""
    if not 0 < arguments.seconds <= 600:
        raise InputError(f"--seconds is {arguments.seconds:g}: give more than 0 and at most 600")
    from edgespeech.interop.ctc_model import open_ctc_model
    from edgespeech.interop.exported import SUFFIXES, export, open_exported, write_manifest
    from edgespeech.interop.parity import compare, evaluations

    model, tokenizer, about = open_ctc_model(arguments.model)
    if arguments.streaming:
        return _export_streaming(arguments, model, tokenizer, about)
    if arguments.exits:
        return _export_exits(arguments, model, tokenizer, about)
    suffix = (".int8" if arguments.int8 else "") + SUFFIXES[arguments.format]
    path = Path(arguments.output) / ("model" + suffix)
    manifest = export(
        model,
        tokenizer,
        about,
        path,
        form=arguments.format,
        seconds=arguments.seconds,
        int8=arguments.int8,
    )
    manifest["wer"] |= evaluations(Path(arguments.model))
    if arguments.format == "coreml":
        return _leave_unrun(path, manifest)
    difference = compare(model, open_exported(path))
    manifest["difference_from_jax"] = difference._asdict()
    write_manifest(path, manifest)
    print(
        f"{path}: {manifest['bytes'] / 1e6:.2f} MB; logits differ from JAX by {difference.largest:.2g} at most, "
        f"{difference.labels:.1%} of the frames have another label"
    )
    if not arguments.int8 and difference.largest > TOLERANCE:
        raise InputError(
            f"{path} computes something else than JAX ({difference.largest:.2g}): do not use it"
        )
    return 0


def _leave_unrun(path: Path, manifest: dict[str, Any]) -> int:
    """Ends the export of a Core ML package."""
    from edgespeech.interop.exported import write_manifest

    write_manifest(path, manifest)
    print(f"{path}: {manifest['bytes'] / 1e6:.2f} MB; {NOT_RUN}")
    return 0


def _export_exits(arguments: argparse.Namespace, model: Any, tokenizer: Any, about: dict) -> int:
    from edgespeech.interop.exported import write_manifest
    from edgespeech.interop.exported_exits import EXITS, ExitsModel, export_exits
    from edgespeech.interop.parity import compare_exits

    if not isinstance(model, ExitsModel):
        raise InputError(
            f"--exits: {arguments.model} is a {type(model).__name__}, which has no exits: leave it out"
        )
    folder = Path(arguments.output)
    manifest = export_exits(
        model,
        tokenizer,
        about,
        folder,
        form=arguments.format,
        seconds=arguments.seconds,
        int8=arguments.int8,
    )
    for segment in manifest["segments"]:
        print(f"{folder / segment['file']}: {segment['bytes'] / 1e6:.2f} MB")
    if arguments.format == "coreml":
        print(NOT_RUN)
        return 0
    differences = compare_exits(model, folder)
    manifest["difference_from_jax"] = [difference._asdict() for difference in differences]
    write_manifest(folder / EXITS, manifest)
    largest = max(difference.largest for difference in differences)
    print(f"logits of all exits differ from JAX by {largest:.2g} at most")
    if not arguments.int8 and largest > TOLERANCE:
        raise InputError(
            f"{folder} computes something else than JAX ({largest:.2g}): do not use it"
        )
    return 0


def _export_streaming(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, about: dict
) -> int:
    from edgespeech.interop.exported import SUFFIXES, write_manifest
    from edgespeech.interop.exported_stream import ExportedStream, compare_steps
    from edgespeech.interop.parity import evaluations
    from edgespeech.interop.streaming_export import export_streaming
    from edgespeech.models.edge_conformer import EdgeConformer

    if arguments.exits or not isinstance(model, EdgeConformer):
        raise InputError(
            f"--streaming: {arguments.model} is a {type(model).__name__}, which does not stream: choose an edge "
            "Conformer, and leave out --exits"
        )
    chunk = model.config.chunk if arguments.chunk is None else arguments.chunk
    model.set_chunks(chunk, model.config.left if arguments.left is None else arguments.left)
    suffix = (".int8" if arguments.int8 else "") + SUFFIXES[arguments.format]
    path = Path(arguments.output) / ("step" + suffix)
    manifest = export_streaming(
        model, tokenizer, about, path, form=arguments.format, frames=chunk, int8=arguments.int8
    )
    manifest["wer"] |= evaluations(Path(arguments.model))
    if arguments.format == "coreml":
        return _leave_unrun(path, manifest)
    logits, state = compare_steps(model, ExportedStream(path))
    manifest["difference_from_jax"] = logits._asdict() | {"state": state}
    write_manifest(path, manifest)
    print(
        f"{path}: {manifest['bytes'] / 1e6:.2f} MB for steps of {manifest['seconds']:g} s, "
        f"{manifest['state']['bytes'] / 1e3:.1f} kB of state; logits differ from JAX by {logits.largest:.2g} at most, "
        f"the state by {state:.2g} of its largest value, {logits.labels:.1%} of the frames have another label"
    )
    if not arguments.int8 and max(logits.largest, state) > TOLERANCE:
        raise InputError(f"{path} computes something else than JAX: do not use it")
    return 0
