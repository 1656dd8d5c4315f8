"""Time exported models: latency, real-time factor, peak memory and size, on 1 and 2 threads."""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgespeech.errors import InputError

COLUMNS = ("file", "bits", "MB", "threads", "p50 ms", "p90 ms", "p99 ms", "RTF", "peak MB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="what `edgespeech export` wrote")
    parser.add_argument(
        "--threads", default="1,2", help="numbers of threads, parted by commas (default: 1,2)"
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed calls (default: 30)")
    parser.add_argument("--output", metavar="FILE", help="write the rows as JSON, too")


def run(arguments: argparse.Namespace) -> int:
    """Prints a table, a row for each file and number of threads."""
    if arguments.repeats < 1:
        raise InputError(f"--repeats is {arguments.repeats}: give 1 or more")
    try:
        threads = [int(number) for number in arguments.threads.split(",")]
    except ValueError as error:
        raise InputError(f"--threads={arguments.threads}: give numbers such as 1,2") from error
    from edgespeech.evaluation.machine import device, versions

    rows = [
        measure(Path(name), number, arguments.repeats)
        for name in arguments.files
        for number in threads
    ]
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(
        "ms: of a call on audio of the file's whole length; RTF: the median over the audio's length; peak MB: what the "
        "first call takes above the loaded model."
    )
    if arguments.output:
        facts = {"rows": rows, "device": device(), "versions": versions()}
        Path(arguments.output).write_text(json.dumps(facts, indent=2) + "\n")
    return 0


def measure(path: Path, threads: int, repeats: int) -> dict[str, Any]:
    """The row of a file, measured in processes of their own, so that nothing else is in their memory and threads.

    Args:
        path: of the exported file.
        threads: cores that the processes are bound to, and threads of ONNX Runtime.
        repeats: timed calls; three more come before them.

    Raises:
        InputError: the file cannot be opened, or there are fewer cores.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    import numpy as np

    from edgespeech.evaluation.latency import peak_memory_mb, real_time_factor
    from edgespeech.interop.exported import open_exported

    manifest = open_exported(path).manifest
    audio = np.zeros(manifest["inputs"]["audio"]["shape"], np.float32)
    audio[:] = np.random.default_rng(0).normal(0, 0.05, audio.shape)
    load = functools.partial(_load, path, threads)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        milliseconds = executor.submit(_time, load, audio, repeats).result()
    p50, p90, p99 = (float(ms) for ms in np.percentile(milliseconds, [50, 90, 99]))
    return {
        "file": str(path),
        "bits": manifest["bits"],
        "megabytes": path.stat().st_size / 1e6,
        "threads": threads,
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "real_time_factor": real_time_factor(p50, manifest["seconds"]),
        "peak_mb": peak_memory_mb(load, audio),
    }


def _load(path: Path, threads: int) -> Callable[[Any], Callable[[], Any]]:
    """A load as in `evaluation.latency`: binds the process, opens the file."""
    import numpy as np

    from edgespeech.evaluation.latency import limit_threads
    from edgespeech.interop.exported import open_exported

    limit_threads(threads)
    run = open_exported(path, threads).run

    def prepare(audio):
        length = np.array([audio.shape[1]], np.int32)
        return lambda: run(audio, length)

    return prepare


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


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        Path(row["file"]).name,
        str(row["bits"]),
        f"{row['megabytes']:.2f}",
        str(row["threads"]),
        *(f"{row[key]:.1f}" for key in ("p50_ms", "p90_ms", "p99_ms")),
        f"{row['real_time_factor']:.4f}",
        f"{row['peak_mb']:.1f}",
    )
