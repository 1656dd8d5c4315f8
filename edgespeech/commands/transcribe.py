"""Write down what is said in audio files, with the time of every word, or into the microphone."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgespeech.errors import InputError

if TYPE_CHECKING:
    from edgespeech.inference.long_audio import Transcript

FORMATS = ("text", "json", "srt", "vtt")
SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("files", nargs="*", metavar="FILE", help="WAV, FLAC, Ogg or MP3, any rate")
    parser.add_argument(
        "--mic",
        action="store_true",
        help="the microphone until Ctrl-C, in place of files: as it is said by a model that streams (edge Conformer), "
        "at the end by the others; needs the package sounddevice",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="folder of a saved model with a CTC head, or a wav2vec2 of Hugging Face",
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="(default: text)")
    parser.add_argument(
        "--output", metavar="DIR", help="write DIR/NAME.txt (.json, .srt, .vtt) for each file"
    )
    parser.add_argument(
        "--segment", type=float, default=30.0, help="seconds heard at a time (default: 30)"
    )
    parser.add_argument(
        "--overlap", type=float, default=6.0, help="seconds that segments share (default: 6)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Transcribes every file; one that cannot be read is named and the others are done all the same."""
    if arguments.mic:
        return _run_live(arguments)
    if not arguments.files:
        raise InputError("nothing to transcribe: name audio files, or give --mic")
    outputs = _outputs(arguments)
    from edgespeech.inference.long_audio import LongAudio
    from edgespeech.interop.ctc_model import open_ctc_model

    model, tokenizer, _ = open_ctc_model(arguments.model)
    transcribe = LongAudio(
        model,
        tokenizer,
        segment_seconds=arguments.segment,
        overlap_seconds=arguments.overlap,
    )
    failed = 0
    for name, output in zip(arguments.files, outputs, strict=True):
        try:
            transcript = transcribe.file(name)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        text = render(transcript, arguments.format, name)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, encoding="utf-8")
        elif arguments.format == "text" and len(outputs) > 1:
            print(f"{name}: {text}", end="", flush=True)
        else:
            print(text, end="", flush=True)
    if failed:
        print(f"{failed} of {len(outputs)} files failed", file=sys.stderr)
    return 1 if failed else 0


def _run_live(arguments: argparse.Namespace) -> int:
    """Transcribes the microphone until Ctrl-C."""
    if arguments.files or arguments.output or arguments.format != "text":
        raise InputError(
            "--mic writes text to the terminal: leave out files, --format and --output"
        )
    from edgespeech.inference.microphone import Microphone, until_ctrl_c

    microphone = Microphone()  # before the model: without one there is nothing to load it for
    from edgespeech.inference.live import write_text, write_words
    from edgespeech.inference.long_audio import LongAudio
    from edgespeech.interop.ctc_model import open_ctc_model
    from edgespeech.models.edge_conformer import EdgeConformer

    model, tokenizer, _ = open_ctc_model(arguments.model)
    with until_ctrl_c() as stop:
        blocks = microphone.blocks(stop)
        if isinstance(model, EdgeConformer):
            write_words(model, tokenizer, blocks, microphone.rate)
        else:
            settings = {
                "segment_seconds": arguments.segment,
                "overlap_seconds": arguments.overlap,
            }
            write_text(LongAudio(model, tokenizer, **settings), blocks, microphone.rate)
    if microphone.lost:
        print(
            f"audio was lost {microphone.lost} times: this machine is too slow for the model",
            file=sys.stderr,
        )
    return 0


def render(transcript: "Transcript", form: str, name: str) -> str:
    """A transcript in one of `FORMATS`; JSON is one line a recording."""
    from edgespeech.inference.subtitles import srt, vtt
    from edgespeech.inference.words import word_facts

    if form == "json":
        facts = {
            "file": name,
            "seconds": round(transcript.seconds, 3),
            "text": transcript.text,
            "words": word_facts(transcript.words),
        }
        return json.dumps(facts, ensure_ascii=False) + "\n"
    if form == "srt":
        return srt(transcript.words)
    if form == "vtt":
        return vtt(transcript.words)
    return transcript.text + "\n"


def _outputs(arguments: argparse.Namespace) -> list[Path | None]:
    """Where each transcript goes: None is the terminal.

    Raises:
        InputError: two files of one name would be written to one, or subtitles of several files to the terminal.
    """
    if arguments.output is None:
        if arguments.format in ("srt", "vtt") and len(arguments.files) > 1:
            raise InputError(
                "subtitles of several files would run into one another: add --output=DIR"
            )
        return [None] * len(arguments.files)
    paths = [
        Path(arguments.output) / (Path(name).stem + SUFFIXES[arguments.format])
        for name in arguments.files
    ]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(
                f"two files would be written to {path}: rename one, or transcribe them into two folders"
            )
    return list(paths)
