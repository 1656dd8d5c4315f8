"""Long audio: word errors and time of teacher and hybrids on recordings of 30, 60 and 120 s.

Command     python -m experiments.long_audio --checkpoints=RUN/teacher,RUN/hybrid_8 --data=folder --data_dir=DIR \\
                --split=dev-clean --output=runs/long
Hardware    2 CPU cores; for a model at a real-time factor of 0.25, 2.5 minutes of compute for 10 of audio
Expect      OUTPUT/report.md and report.json: for every model and length WER with its interval, its difference from the
            first model's, and seconds of compute, in one pass and, for CTC models, in overlapping segments

Recordings are successive utterances of one speaker (`edgespeech.evaluation.long_recordings`). `whole` is one pass over
all of a recording, where attention costs the square of its length. `segments` is `edgespeech.inference.long_audio`:
cuts of --segment_seconds whose labels are joined. Only a CTC model has labels of frames to join, so a Moonshine has
`whole` alone. Batch 1; what has to be compiled is compiled before the clock starts. Ours.
"""

import datetime
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from flax import nnx

from edgespeech.data.batching import Batch
from edgespeech.data.tokenizer import Tokenizer
from edgespeech.errors import InputError
from edgespeech.evaluation.decode import Decoder, GreedyDecoder, Seq2SeqDecoder
from edgespeech.evaluation.long_recordings import Joined, Transcribed, transcribe
from edgespeech.evaluation.machine import device, versions
from edgespeech.evaluation.report_text import (
    device_text,
    interval,
    pairs,
    percent,
    points,
    synthetic_mark,
    synthetic_warning,
    table,
    write_files,
)
from edgespeech.evaluation.wer import paired_bootstrap
from edgespeech.inference.long_audio import LongAudio
from edgespeech.interop.ctc_model import PlainCTC
from edgespeech.interop.open_model import open_model
from edgespeech.models.moonshine import Moonshine
from edgespeech.types import SAMPLE_RATE
from experiments import asr, program, split_flags

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(split_flags)

flags.DEFINE_list(
    "checkpoints",
    None,
    "Models with a CTC head or Moonshines: saved ones, checkpoints of Hugging Face, or 'wheel'. The others are "
    "compared with the first.",
    required=True,
)
flags.DEFINE_list("seconds", ["30", "60", "120"], "Lengths of the recordings at most.")
flags.DEFINE_float(
    "minutes", 10.0, "Audio of each length at most, from the speakers in turn.", lower_bound=0.0
)
flags.DEFINE_float("segment_seconds", 30.0, "Of `segments`.", lower_bound=0.0)
flags.DEFINE_float("overlap_seconds", 6.0, "What neighbouring segments share.", lower_bound=0.0)
flags.DEFINE_string("output", None, "Folder of the report.", required=True)


def experiment() -> None:
    """Join, transcribe, compare."""
    corpus = split_flags.open_split()
    recordings = {seconds: Joined(corpus, seconds, FLAGS.minutes) for seconds in lengths()}
    first: dict[tuple[float, str], Transcribed] = {}
    rows = []
    for name in FLAGS.checkpoints:
        model, tokenizer, _ = open_model(name)
        for seconds, joined in recordings.items():
            for way, text_of, compared in ways(name, model, tokenizer, seconds):
                # Padded to one length, recordings make one program; the last segment of each has a length of its own.
                done = transcribe(joined, text_of, compared, warm=1 if way == "whole" else None)
                reference = first.setdefault((seconds, way), done)
                rows.append(row_of(name, seconds, way, done, reference))
                if not FLAGS.quiet:
                    print(
                        f"{name}, {seconds:g} s, {way}: WER {done.result.wer:.2%}, "
                        f"{done.seconds:.1f} s for {done.audio_seconds:.0f} s",
                        flush=True,
                    )
    report = {
        "command": program.command_line(),
        "date": datetime.date.today().isoformat(),
        "data": {
            "kind": corpus.kind,
            "description": asr.describe_data(corpus.kind),
            "split": FLAGS.split,
        },
        "recordings": {f"{s:g}": asr.split_facts(joined) for s, joined in recordings.items()},
        "segments": {"seconds": FLAGS.segment_seconds, "overlap": FLAGS.overlap_seconds},
        "rows": rows,
        "versions": versions(),
        "device": device(),
    }
    write_files(FLAGS.output, report, render)
    print(f"report: {Path(FLAGS.output) / 'report.md'}")


def lengths() -> list[float]:
    """The values of --seconds, ascending.

    Raises:
        InputError: one is not a number above 0.
    """
    try:
        values = sorted({float(text) for text in FLAGS.seconds})
    except ValueError:
        values = []
    if not values or not values[0] > 0:
        raise InputError(f"--seconds={','.join(FLAGS.seconds)}: give numbers above 0")
    return values


def ways(
    name: str, model: Any, tokenizer: Any, seconds: float
) -> Iterator[tuple[str, Callable[[np.ndarray], str], Callable[[str], str]]]:
    """How the model can take a recording: name, audio to text, and the form in which texts are compared.

    Raises:
        InputError: the model is neither a Moonshine nor one with a CTC head.
    """
    graphdef, state = nnx.split(model)
    if isinstance(model, Moonshine):
        decoder: Decoder = Seq2SeqDecoder(graphdef, tokenizer)
    elif isinstance(model, PlainCTC) and isinstance(tokenizer, Tokenizer):
        decoder = GreedyDecoder(graphdef, tokenizer)
    else:
        raise InputError(
            f"--checkpoints holds {name}, a {type(model).__name__}: give models with a CTC head, or Moonshines"
        )
    size = round(seconds * SAMPLE_RATE)
    yield "whole", functools.partial(whole_text, decoder, state, size), decoder.compared
    if isinstance(model, PlainCTC):
        segments = LongAudio(
            model,
            tokenizer,
            segment_seconds=FLAGS.segment_seconds,
            overlap_seconds=FLAGS.overlap_seconds,
        )
        yield "segments", lambda audio: segments.stream([audio]).text, decoder.compared


def whole_text(decoder: Decoder, state: nnx.State, size: int, audio: np.ndarray) -> str:
    """The text of a recording `[t]` in one pass, padded to `size` samples."""
    padded = np.zeros((1, size), np.float32)
    padded[0, : len(audio)] = audio
    one = np.ones(1, np.int32)
    batch = Batch(
        audio=padded,
        audio_lengths=len(audio) * one,
        targets=np.zeros((1, 1), np.int32),
        target_lengths=0 * one,
        weights=np.ones(1, np.float32),
        index=0 * one,
    )
    return decoder.texts(state, batch)[0]


def row_of(
    name: str, seconds: float, way: str, done: Transcribed, first: Transcribed
) -> dict[str, Any]:
    """A row of the report."""
    difference = paired_bootstrap(first.result, done.result)
    count = len(done.result.utterances)
    return {
        "model": name,
        "seconds": seconds,
        "way": way,
        **done.result.to_json(),
        "vs_first": {"difference": difference.difference, "ci": list(difference.ci)},
        "compute_seconds": done.seconds / count,
        "speed_up": first.seconds / done.seconds,
        "real_time_factor": done.seconds / done.audio_seconds,
    }


def render(report: Mapping[str, Any], images: Sequence[Path]) -> str:
    """The text of report.md."""
    del images
    mark = synthetic_mark(report["data"])
    header = ["model", "way", "WER", "95 % CI", "- first model", "95 % CI"]
    header += ["seconds a recording", "real-time factor", "speed-up"]
    blocks = [
        "# Long audio",
        *synthetic_warning(report["data"]),
        f"Date: {report['date']}. {report['data']['split']}, utterances of one speaker joined. `whole`: one pass over "
        f"the recording. `segments`: cuts of {report['segments']['seconds']:g} s that share "
        f"{report['segments']['overlap']:g} s. Intervals are 95 % bootstraps over recordings, which are few; "
        "differences in percentage points and speed-ups are from the first model, taken the same way. Batch 1, "
        "compilation not counted.",
        f"```\n{report['command']}\n```",
    ]
    for seconds, facts in report["recordings"].items():
        lines = [
            [
                row["model"],
                row["way"],
                percent(row["wer"]),
                interval(row["ci"]),
                points(row["vs_first"]["difference"]),
                interval(row["vs_first"]["ci"], points),
                f"{row['compute_seconds']:.2f}",
                f"{row['real_time_factor']:.3f}",
                f"{row['speed_up']:.2f}",
            ]
            for row in report["rows"]
            if f"{row['seconds']:g}" == seconds
        ]
        mean = 3600 * facts["hours"] / facts["utterances"]
        blocks += [
            f"## {seconds} s",
            table(
                f"{facts['utterances']} recordings of {mean:.1f} s on average, {facts['speakers']} speakers{mark}",
                header,
                lines,
            ),
        ]
    facts = [
        f"- Device: {device_text(report['device'])}",
        f"- Versions: {pairs(report['versions'])}",
    ]
    blocks += ["## Run", "\n".join(facts)]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    program.main(experiment)
