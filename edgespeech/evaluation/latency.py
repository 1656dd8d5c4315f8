"""What inference costs in time and memory: timing, peak memory, parts of a model, and the ratios that sum it up.

A *call* takes no argument, runs a model once and returns arrays. An implementation under test is a *load*: `load()`
makes the model and returns `prepare`, and `prepare(audio [1 t])` returns a call. A load is picklable (a module-level
function, or a `functools.partial` of one), because peak memory is measured in a process of its own.
"""

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import numpy as np

from edgespeech.errors import InputError

Call: TypeAlias = Callable[[], Any]
Prepare: TypeAlias = Callable[[np.ndarray], Call]
Load: TypeAlias = Callable[[], Prepare]
Name = TypeVar("Name", bound=Hashable)

OURS = "edgespeech"  # the implementation that the others are compared with


# ---------------------------------------------------------------------------------------------- time


class Timing(NamedTuple):
    """Times of one contender in ms.

    Attributes:
        median_ms: median over the repeats.
        spread_ms: interquartile range, between linearly interpolated quartiles.
    """

    median_ms: float
    spread_ms: float


def interleave(
    contenders: Mapping[Name, Call],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, Timing]:
    """Times all contenders in turn, round after round, so that a drift of the machine hits all of them alike.

    The clock runs from the call to the end of `block_until_ready` on what it returned, and nothing else
    synchronises. Arrays of other libraries count as ready when the call returns.

    Args:
        contenders: calls by name.
        repeats: rounds that count.
        warmup: rounds ahead of them that do not.
        clock: seconds.

    Raises:
        InputError: no repeats.
    """
    if repeats < 1:
        raise InputError(f"repeats is {repeats}: a median needs at least 1")
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + repeats):
        for name, call in contenders.items():
            start = clock()
            jax.block_until_ready(call())
            elapsed = clock() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: summarise(samples) for name, samples in seconds.items()}


def summarise(seconds: Sequence[float]) -> Timing:
    """Median and interquartile range of samples in seconds."""
    low, median, high = np.percentile(np.asarray(seconds) * 1e3, [25, 50, 75])
    return Timing(float(median), float(high - low))


def real_time_factor(median_ms: float, audio_seconds: float) -> float:
    """Computing time over the audio's duration: below 1 is faster than real time."""
    return median_ms / 1e3 / audio_seconds


def limit_threads(threads: int | None) -> int:
    """Binds this process and its children to so many of its cores; returns their number.

    XLA sizes its thread pool by the cores that a process may use, so call this before JAX's first computation.

    Args:
        threads: None: all cores stay.

    Raises:
        InputError: fewer cores than threads, or an operating system that cannot bind a process.
    """
    if not hasattr(os, "sched_setaffinity"):
        if threads is not None:
            raise InputError(
                f"{threads} threads: {sys.platform} cannot bind a process to cores; leave the limit out"
            )
        return os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))
    if threads is None:
        return len(cores)
    if not 1 <= threads <= len(cores):
        raise InputError(f"{threads} threads: give 1 to {len(cores)}, the cores of this process")
    os.sched_setaffinity(0, cores[:threads])
    return threads


# -------------------------------------------------------------------------------------------- memory


def peak_memory_mb(load: Load, audio: np.ndarray) -> float:
    """Peak memory of the first call, in MB of 1e6 bytes, measured in a fresh process.

    Counted is what the resident memory of that process reaches during `call()` above where it stood just before.
    Activations, scratch space and the output are in; interpreter, libraries, parameters and the compiled program
    are not. Where the allocator serves the call from memory that building the model had freed, that part is missed,
    and so is the memory of an accelerator.

    On Linux the kernel's peak (VmHWM) is restarted before the call. `ru_maxrss` cannot be: it keeps the peak of
    building and compiling, and even of the parent process, whose value a child inherits over exec. Elsewhere it is
    `ru_maxrss` after the call less that before, which is too low when building took more memory than the call.

    Args:
        load: the implementation.
        audio: `[1 t]`, float32.
    """
    context = multiprocessing.get_context("spawn")
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    with ProcessPoolExecutor(1, context, _use_cache, (cache,)) as executor:
        return executor.submit(_first_call_mb, load, audio).result()


def _use_cache(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)


def _first_call_mb(load: Load, audio: np.ndarray) -> float:
    call = load()(audio)
    restart = Path("/proc/self/clear_refs")
    if restart.exists():
        restart.write_text("5")  # VmHWM := resident memory now
    before = _peak_mb()
    jax.block_until_ready(call())
    return _peak_mb() - before


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [row for row in status.read_text().splitlines() if row.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# --------------------------------------------------------------------------------------------- parts


def sum_parts(
    uses: Sequence[tuple[str, Hashable]], timings: Mapping[Any, Timing]
) -> dict[str, float]:
    """Milliseconds of each part: the medians of all its uses added up."""
    totals: dict[str, float] = {}
    for part, key in uses:
        totals[part] = totals.get(part, 0.0) + timings[key].median_ms
    return totals


# -------------------------------------------------------------------------------------------- ratios


def amdahl_bound(total_ms: float, old_ms: float, new_ms: float) -> float:
    """The speed-up when parts of `old_ms` out of `total_ms` give way to parts of `new_ms` and all else stays.

        bound = T / (T - old + new)

    For N layers, old = N t_attention and new = N t_LPA. After Amdahl (1967).
    """
    return total_ms / (total_ms - old_ms + new_ms)


def ratios(rows: Sequence[Mapping[str, Any]], peers: Sequence[str]) -> dict[str, dict]:
    """Speed-ups by length and number of replaced layers, `{name: {seconds: {replaced: ratio}}}`; above 1 is faster.

    `like_for_like` is our median with nothing replaced over ours with N layers replaced, and `amdahl_bound` what
    the parts measured for both allow it to be, the whole being their sum. `vs_PEER` is the peer's median over ours.

    Args:
        rows: with `implementation`, `replaced`, `seconds`, `median_ms`, and `parts_ms`, which may be empty.
        peers: implementations to compare with; one without rows has no ratios.
    """
    table = {(row["implementation"], row["replaced"], row["seconds"]): row for row in rows}
    found: dict[str, dict] = {"like_for_like": {}, "amdahl_bound": {}}
    found |= {f"vs_{peer}": {} for peer in peers}

    def enter(name: str, row: Mapping[str, Any], ratio: float) -> None:
        by_replaced = found[name].setdefault(f"{row['seconds']:g}", {})
        by_replaced[str(row["replaced"])] = ratio

    for row in rows:
        if row["implementation"] != OURS:
            continue
        for peer in peers:
            if (peer, 0, row["seconds"]) in table:
                theirs = table[peer, 0, row["seconds"]]["median_ms"]
                enter(f"vs_{peer}", row, theirs / row["median_ms"])
        if row["replaced"]:
            whole = table[OURS, 0, row["seconds"]]
            enter("like_for_like", row, whole["median_ms"] / row["median_ms"])
            if row["parts_ms"]:
                # Of the parts alone: timed on their own, they may take more or less than in the whole.
                parts = whole["parts_ms"]
                mixers = parts["mixers"], row["parts_ms"]["mixers"]
                enter("amdahl_bound", row, amdahl_bound(sum(parts.values()), *mixers))
    return found
