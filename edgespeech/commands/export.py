"""Write a model into a file for a device: StableHLO or ONNX, float32 or int8, with a manifest."""

import argparse
from pathlib import Path
from typing import Any

from edgespeech.errors import InputError

FORMATS = ("stablehlo", "onnx")
SUFFIXES = {"stablehlo": ".stablehlo", "onnx": ".onnx"}
# Largest difference of logits between the file and JAX that passes for float rounding.
TOLERANCE = 1e-3


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
    parser.add_argument("--int8", action="store_true", help="weights of 8 bits (--format=onnx)")
    parser.add_argument(
        "--output", metavar="DIR", default="exported", help="folder of the file (default: exported)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Exports, opens the file in its own runtime and compares it with JAX."""
    if not 0 < arguments.seconds <= 600:
        raise InputError(f"--seconds is {arguments.seconds:g}: give more than 0 and at most 600")
    from edgespeech.interop.ctc_model import open_ctc_model
    from edgespeech.interop.exported import export, open_exported, write_manifest
    from edgespeech.interop.parity import compare, evaluations

    model, tokenizer, about = open_ctc_model(arguments.model)
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


def _export_exits(arguments: argparse.Namespace, model: Any, tokenizer: Any, about: dict) -> int:
    from edgespeech.interop.exported_exits import export_exits
    from edgespeech.models.splitformer import Splitformer

    if not isinstance(model, Splitformer):
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
    return 0
