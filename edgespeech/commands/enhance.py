"""Take the noise out of a recording, or part the voices in it: same rate, channels and length out."""

import argparse
from pathlib import Path

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
        help="folder of a saved SepFormer, such as WORKDIR/teacher or WORKDIR/hybrid_16 of lpa_sepformer, or of "
        "SpeechBrain's at 8 kHz, such as a download of speechbrain/sepformer-wham-enhancement",
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
    from edgespeech.interop.pretrained import load_pretrained
    from edgespeech.interop.speechbrain_sepformer import load_speechbrain_sepformer
    from edgespeech.models.sepformer import SepFormer

    folder = Path(arguments.model)
    if (folder / "masknet.ckpt").exists():
        model = load_speechbrain_sepformer(folder)
    else:
        model, _, _ = load_pretrained(folder)
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
