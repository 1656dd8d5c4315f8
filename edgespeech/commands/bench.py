"""Time exported models, also beside those of others: latency, real-time factor, memory, size and word error rate."""

import argparse
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgespeech.errors import InputError

if TYPE_CHECKING:
    from edgespeech.evaluation.bench_files import ExportedFile

COLUMNS = ("file", "bits", "MB", "threads", "p50 ms", "p90 ms", "p99 ms", "RTF", "peak MB")
NOTE = (
    "ms: of a call on audio of the file's whole length, or of a step on its chunk; RTF: the median over the audio's "
    "length; peak MB: what the first call takes above the loaded model."
)
SPEECH_COLUMNS = ("name", "version", *COLUMNS[1:], "WER %")
SPEECH_NOTE = (
    "ms: of a recording; RTF: all computing over all audio; peak MB: what the longest recording takes above the loaded "
    "model; WER: without case and punctuation, with its 95 % interval."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="what `edgespeech export` wrote; of --exits the folder, for a row for each exit",
    )
    parser.add_argument(
        "--threads", default="1,2", help="numbers of threads, parted by commas (default: 1,2)"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        help="timed calls (default: 30), or turns through --speech (default: 1)",
    )
    parser.add_argument("--output", metavar="FILE", help="write the rows as JSON, too")
    parser.add_argument(
        "--speech",
        metavar="DIR",
        help="recordings to hear, with transcripts for the WER: a split such as LibriSpeech/test-clean",
    )
    parser.add_argument(
        "--utterances", type=int, default=20, help="of --speech, evenly spread (default: 20)"
    )
    parser.add_argument(
        "--peers", action="store_true", help="time the recognisers of others, too (with --speech)"
    )
    parser.add_argument(
        "--peer_model",
        action="append",
        default=[],
        metavar="NAME:PATH",
        help="where the model of a peer is that brings none, such as vosk:DIR",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw WER over real-time factor, a PNG (with --speech)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints a table, a row for each file (and peer) and number of threads."""
    if arguments.repeats is not None and arguments.repeats < 1:
        raise InputError(f"--repeats is {arguments.repeats}: give 1 or more")
    try:
        threads = [int(number) for number in arguments.threads.split(",")]
    except ValueError as error:
        raise InputError(f"--threads={arguments.threads}: give numbers such as 1,2") from error
    if not arguments.speech and (arguments.peers or arguments.peer_model or arguments.plot):
        raise InputError(
            "--peers, --peer_model and --plot need recordings: what others take depends on what is said; add "
            "--speech=DIR"
        )
    if not arguments.files and not arguments.peers:
        raise InputError("nothing to time: name files that `edgespeech export` wrote, or --peers")
    if arguments.speech:
        return _run_speech(arguments, threads)
    from edgespeech.evaluation.bench_files import open_files

    rows = [
        measure(file, number, arguments.repeats or 30)
        for file in open_files(arguments.files)
        for number in threads
    ]
    _print_table([COLUMNS, *((row["file"], *_cells(row)) for row in rows)])
    print(NOTE)
    _write(arguments.output, {"rows": rows})
    return 0


def _run_speech(arguments: argparse.Namespace, threads: list[int]) -> int:
    """The same on recordings; a peer that fails is named, and the others are done all the same."""
    models = {}
    for pair in arguments.peer_model:
        name, colon, path = pair.partition(":")
        if not colon or not path:
            raise InputError(f"--peer_model={pair}: give a name and a path, such as vosk:DIR")
        models[name] = Path(path)
    from edgespeech.data.folder import FolderCorpus
    from edgespeech.evaluation.bench_files import open_files
    from edgespeech.evaluation.bench_peers import find_peers
    from edgespeech.evaluation.bench_speech import (
        choose_recordings,
        int8_against_float,
        measure_speech,
        wer_over_time,
    )
    from edgespeech.types import SAMPLE_RATE

    files = open_files(arguments.files)
    peers, notes = find_peers(models) if arguments.peers else ([], [])
    folder = Path(arguments.speech).resolve()
    corpus = FolderCorpus(folder.parent, folder.name, require_text=False)
    limits = [file.most_samples for file in files if file.most_samples is not None]
    recordings, too_long = choose_recordings(
        corpus, arguments.utterances, min(limits, default=None)
    )
    seconds = sum(len(recording.samples) for recording in recordings) / SAMPLE_RATE
    heard = f"{len(recordings)} recordings of {folder.name}, {seconds:.0f} s"
    if too_long:
        notes.append(f"{too_long} recordings are longer than a file takes: left out of every row")
    rows, failed = [], 0
    for recogniser in [*files, *peers]:
        try:
            rows += [
                measure_speech(recogniser, recordings, number, arguments.repeats or 1)
                for number in threads
            ]
        except InputError:
            raise
        except (
            Exception
        ) as error:  # whatever another project's library throws, or a crash of its process
            if recogniser in files:
                raise
            notes.append(f"{recogniser.name} {recogniser.version} failed: {error!r}")
            failed += 1
    pairs = int8_against_float(rows, recordings)
    _print_table([SPEECH_COLUMNS, *map(_speech_cells, rows)])
    for line in (f"Heard: {heard}.", SPEECH_NOTE, *map(_int8_line, pairs), *notes):
        print(line)
    facts = {"rows": rows, "speech": heard, "int8_against_float": pairs, "notes": notes}
    _write(arguments.output, facts)
    if arguments.plot:
        wer_over_time(arguments.plot, rows, heard)
    return 1 if failed else 0


def _print_table(cells: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _write(output: str | None, facts: dict[str, Any]) -> None:
    if output:
        from edgespeech.evaluation.machine import device, versions

        facts |= {"device": device(), "versions": versions()}
        Path(output).write_text(json.dumps(facts, indent=2) + "\n")


def measure(file: "ExportedFile", threads: int, repeats: int) -> dict[str, Any]:
    """The row of a file, measured in processes of their own, so that nothing else is in their memory and threads.

    Args:
        file: what is timed.
        threads: cores that the processes are bound to, and threads of ONNX Runtime or LiteRT.
        repeats: timed calls; three more come before them.

    Raises:
        InputError: the file cannot be opened (a Core ML package cannot), or there are fewer cores.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    import numpy as np

    from edgespeech.evaluation.latency import peak_memory_mb, real_time_factor

    audio = np.random.default_rng(0).normal(0, 0.05, (1, file.samples)).astype(np.float32)
    load = functools.partial(_load, file, threads)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        milliseconds = executor.submit(_time, load, audio, repeats).result()
    p50, p90, p99 = (float(ms) for ms in np.percentile(milliseconds, [50, 90, 99]))
    return {
        "file": file.name,
        "bits": file.bits,
        "megabytes": file.model_bytes / 1e6,
        "threads": threads,
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "real_time_factor": real_time_factor(p50, file.seconds),
        "peak_mb": peak_memory_mb(load, audio),
    }


def _load(file: "ExportedFile", threads: int) -> Callable[[Any], Callable[[], Any]]:
    """A load as in `evaluation.latency`: binds the process, opens the file."""
    from edgespeech.evaluation.latency import limit_threads

    limit_threads(threads)
    file.load(threads)
    return file.prepare


def _time(load: Callable[[], Any], audio: Any, repeats: int) -> list[float]:
    """Milliseconds of each call."""
    import jax

    call = load()(audio)
    times = []
    for turn in range(3 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        if turn >= 3:
            times.append((time.perf_counter() - start) * 1e3)
    return times


def _int8_line(pair: Mapping[str, Any]) -> str:
    """A sentence on 8 bits, of a pair of `int8_against_float`."""
    if pair["wer"] is None:
        wer = "without transcripts"
    else:
        change, low, high = (100 * value for value in (pair["wer"], *pair["ci"]))
        wer = f"WER {change:+.2f} points ({low:+.2f} to {high:+.2f})"
    return (
        f"{pair['file']} against 32 bits, threads: {pair['threads']}: {wer}, {pair['size']:.2f} of the size, "
        f"{pair['time']:.2f} of the time"
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        "-" if row["bits"] is None else str(row["bits"]),
        f"{row['megabytes']:.2f}",
        str(row["threads"]),
        *(f"{row[key]:.1f}" for key in ("p50_ms", "p90_ms", "p99_ms")),
        f"{row['real_time_factor']:.4f}",
        f"{row['peak_mb']:.1f}",
    )


def _speech_cells(row: dict[str, Any]) -> tuple[str, ...]:
    score = row["score"]
    if score is None:
        wer = "-"
    else:
        low, high = score["ci"]
        wer = f"{100 * score['wer']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    return (row["file"], row["version"], *_cells(row), wer)
