"""Take the noise out of a recording, or part the voices in it: same rate, channels and length out."""

import argparse

from edgespeech.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("source", help="WAV, FLAC, Ogg or MP3, any rate and number of channels")
    parser.add_argument(
        "outputs", nargs="+", metavar="output", help="a file for each voice of the model"
    )
    parser.add_argument(
        "--model",
        required=True,
        help="folder of a saved SepFormer, such as WORKDIR/teacher or WORKDIR/hybrid_16 of lpa_sepformer",
    )
    parser.add_argument(
        "--segment", type=float, default=8.0, help="seconds heard at a time (default: 8)"
    )
    parser.add_argument(
        "--overlap", type=float, default=1.0, help="seconds that segments share (default: 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes one file for each voice."""
    from edgespeech.inference.enhance import enhance_file
    from edgespeech.interop.open_model import open_model
    from edgespeech.models.sepformer import SepFormer

    model, _, _ = open_model(arguments.model)
    if not isinstance(model, SepFormer):
        raise InputError(
            f"{arguments.model} is a {type(model).__name__}: enhancement needs a saved SepFormer"
        )
    enhance_file(
        model,
        arguments.source,
        arguments.outputs,
        segment_seconds=arguments.segment,
        overlap_seconds=arguments.overlap,
    )
    print(", ".join(arguments.outputs))
    return 0
