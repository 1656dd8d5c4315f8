"""What inference costs in time and memory: timing, peak memory, parts of a model, and the ratios that sum it up.

A *call* takes no argument, runs a model once and returns arrays. An implementation under test is a *load*: `load()`
makes the model and returns `prepare`, and `prepare(audio [1 t])` returns a call. A load is picklable (a module-level
function, or a `functools.partial` of one), because peak memory is measured in a process of its own.
"""

import dataclasses
import functools
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA, harden
from edgespeech.nn.lpa_config import LPAConfig
from edgespeech.nn.token_mixer_controls import Removed
from edgespeech.nn.transformer import EncoderLayer
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Audio, Frames, Lengths, Logits

Call: TypeAlias = Callable[[], Any]
Prepare: TypeAlias = Callable[[np.ndarray], Call]
Load: TypeAlias = Callable[[], Prepare]
# `run(part, function, module, *arrays)` returns `function(module, *arrays)`.
RunPart: TypeAlias = Callable[..., Any]
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


# -------------------------------------------------------------------------------------------- models


class TimedModel(Protocol):
    """What the latency program asks of a model; picklable, and without arrays until `build`."""

    @property
    def config(self) -> Any:
        """By which peers are found."""
        ...

    @property
    def num_layers(self) -> int:
        """Mixers that can be replaced."""
        ...

    def num_frames(self, num_samples: int) -> int:
        """Output frames for so many samples."""
        ...

    def build(self, replaced: Sequence[int]) -> Any:
        """The model with random weights and hard LPA in these layers, counted from 0."""
        ...

    def forward(self, model: Any, audio: Audio, lengths: Lengths) -> Array:
        """What is timed."""
        ...

    def run_parts(self, model: Any, audio: Audio, lengths: Lengths, run: RunPart) -> Array:
        """The same result as `forward`, every step through `run`. The replaceable steps are named `mixers`."""
        ...


@dataclasses.dataclass(frozen=True)
class TimedWav2Vec2:
    """`Wav2Vec2` as a `TimedModel`; weights are random, N(0, 0.02^2), which changes no time: all operations are dense.

    Attributes:
        config: sizes of the model.
        lpa: of the replaced layers.
    """

    config: Wav2Vec2Config
    lpa: LPAConfig = dataclasses.field(default_factory=LPAConfig)

    @property
    def num_layers(self) -> int:
        """Encoder layers."""
        return self.config.num_layers

    def num_frames(self, num_samples: int) -> int:
        """Encoder frames."""
        return self.config.num_frames(num_samples)

    def build(self, replaced: Sequence[int]) -> Wav2Vec2:
        """The hybrid with hard LPA in these layers, counted from 0; for none, attention everywhere."""

        def make() -> Wav2Vec2:
            model = Wav2Vec2(self.config, rngs=nnx.Rngs(0))
            for i in replaced:
                attention = cast(SelfAttention, model.layers[i].mixer)
                lpa = LPA.from_attention(attention, self.lpa, rngs=nnx.Rngs(i))
                model.layers[i].mixer = lpa
            if replaced:
                harden(model)
            return model

        # Shapes by tracing, values by NumPy: JAX compiles an initialiser for every shape, in every child process anew
        # (three layers of width 16: 6 s of CPU time against 0.5 s, jax 0.10.2).
        graphdef, state = nnx.split(nnx.eval_shape(make))
        random = np.random.default_rng(0)
        weights = jax.tree.map(
            lambda leaf: jnp.asarray(0.02 * random.standard_normal(leaf.shape), leaf.dtype), state
        )
        return nnx.merge(graphdef, weights)

    def forward(self, model: Wav2Vec2, audio: Audio, lengths: Lengths) -> Logits:
        """Logits `[1 n v]`."""
        return model(audio, lengths).logits

    def run_parts(self, model: Wav2Vec2, audio: Audio, lengths: Lengths, run: RunPart) -> Logits:
        """front_end, projection_positions, then mixers and ffn for every layer, head; norms count with ffn."""
        norm = () if self.config.norm_first else (model.norm,)
        head = (model.norm, model.head) if self.config.norm_first else (model.head,)
        x, lengths = run("front_end", _apply, model.front_end, audio, lengths)
        entry = (model.projection_norm, model.projection, model.positions, *norm)
        x = run("projection_positions", _project, entry, x, lengths)
        for layer in model.layers:
            h = run("ffn", _apply, layer.mixer_norm, x) if layer.norm_first else x
            y = run("mixers", _apply, layer.mixer, h, lengths)
            x = run("ffn", _after_mixer, _without_mixer(layer), x, y, lengths)
        return run("head", _chain, head, x)


def _apply(module: Any, *arrays: Array) -> Any:
    return module(*arrays)


def _chain(modules: tuple, x: Frames) -> Frames:
    for module in modules:
        x = module(x)
    return x


def _project(modules: tuple, x: Frames, lengths: Lengths) -> Frames:
    """From the front end's channels to the first layer's input, as in `Wav2Vec2`."""
    projection_norm, projection, positions, *norm = modules
    x = zero_padding(projection(projection_norm(x)), mask_from_lengths(lengths, x.shape[1]))
    return _chain(tuple(norm), x + positions(x, lengths))


def _without_mixer(layer: EncoderLayer) -> EncoderLayer:
    """A copy that is alike for all layers, whatever their mixers are."""
    copy = nnx.merge(*nnx.split(layer))
    copy.mixer = Removed()
    return copy


def _after_mixer(layer: EncoderLayer, x: Frames, y: Frames, lengths: Lengths) -> Frames:
    """The layer on x where the mixer's output is known to be y: residuals, norms and FFN remain."""
    layer.mixer = lambda *_: y
    return layer(x, lengths)


# ----------------------------------------------------------------------------------------- compiling


def compile_ahead(
    function: Callable[..., Any], module: Any, *arrays: Array
) -> tuple[Callable[..., Any], list[Array]]:
    """Compiles `function(module, *arrays)` for the shapes given: the executable, and its first argument.

    That argument is the list of the module's arrays: flattening a module takes longer than starting the program.
    """
    graphdef, state = nnx.split(module)
    leaves, structure = jax.tree.flatten(state)

    def run(leaves, *arrays):
        return function(nnx.merge(graphdef, jax.tree.unflatten(structure, leaves)), *arrays)

    return jax.jit(run).lower(leaves, *arrays).compile(), leaves


def prepare_forward(timed: TimedModel, model: Any, audio: np.ndarray) -> functools.partial:
    """The compiled forward pass on audio `[1 t]`, as a call."""
    arrays = _arrays(audio)
    executable, leaves = compile_ahead(timed.forward, model, *arrays)
    return functools.partial(executable, leaves, *arrays)


def load_model(timed: TimedModel, replaced: Sequence[int]) -> Prepare:
    """`build` and `prepare_forward`: with its arguments bound, a load."""
    return functools.partial(prepare_forward, timed, timed.build(replaced))


def prepare_parts(
    timed: TimedModel, model: Any, audio: np.ndarray, calls: dict[Hashable, functools.partial]
) -> list[tuple[str, Hashable]]:
    """Compiles every distinct part of the model on its own, with the input that it has inside the model.

    Parts are alike when function, structure and shapes are: twelve equal layers are compiled and timed once.

    Args:
        timed: how the model falls into parts.
        model: from `timed.build`.
        audio: `[1 t]`.
        calls: parts by key; those not there yet are added.

    Returns:
        Name and key of every part that the model runs, in order, with repetitions.
    """
    uses: list[tuple[str, Hashable]] = []

    def run(part: str, function: Callable[..., Any], module: Any, *arrays: Array) -> Any:
        graphdef, state = nnx.split(module)
        key = (function, graphdef, tuple((array.shape, array.dtype) for array in arrays))
        if key not in calls:
            executable, leaves = compile_ahead(function, module, *arrays)
            calls[key] = functools.partial(executable, leaves, *arrays)
        uses.append((part, key))
        return calls[key].func(jax.tree.leaves(state), *arrays)

    timed.run_parts(model, *_arrays(audio), run)
    return uses


def _arrays(audio: np.ndarray) -> tuple[Audio, Lengths]:
    return jnp.asarray(audio), jnp.asarray([audio.shape[1]])


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
    the parts measured for both allow it to be. `vs_PEER` is the peer's median over ours.

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
                mixers = whole["parts_ms"]["mixers"], row["parts_ms"]["mixers"]
                enter("amdahl_bound", row, amdahl_bound(whole["median_ms"], *mixers))
    return found
