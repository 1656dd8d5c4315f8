"""Self-attention in two layouts, from the same parameters, through XLA and through LiteRT.

    standard         `[b n d]`: `SelfAttention`
    channels first   `[b d 1 n]`: `ChannelsFirstAttention`, one head and one chunk of queries at a time

Each takes and gives its own layout: a network in (B, C, 1, S) turns its input once, not in every layer.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.evaluation.latency import Timing, interleave, limit_threads
from edgespeech.evaluation.latency_models import random_weights
from edgespeech.interop.litert_export import load_litert, to_litert
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.channels_first import ChannelsFirstAttention, to_channels_first

STANDARD, CHANNELS_FIRST = "standard", "channels first"
RUNTIMES = ("XLA", "LiteRT")


class Contender(NamedTuple):
    """What is timed.

    Attributes:
        frames: n.
        layout: `STANDARD`, or `CHANNELS_FIRST`.
        chunk: queries at a time of channels first; 0: all.
        runtime: one of `RUNTIMES`.
    """

    frames: int
    layout: str
    chunk: int
    runtime: str


class Layouts(NamedTuple):
    """Sizes of the layer and what is compared.

    Attributes:
        width: d.
        num_heads: heads.
        frames: lengths n.
        chunks: queries at a time of channels first; 0: all. Those of n and more are left out.
    """

    width: int
    num_heads: int
    frames: Sequence[int]
    chunks: Sequence[int]

    def attention(self) -> SelfAttention:
        """The layer, its weights N(0, 0.02^2)."""
        return random_weights(lambda: SelfAttention(self.width, self.num_heads, rngs=nnx.Rngs(0)))

    def input(self, n: int) -> np.ndarray:
        """float32 `[1 n d]`, N(0, 1)."""
        x = np.random.default_rng(n).normal(size=(1, n, self.width))
        return x.astype(np.float32)


class Measured(NamedTuple):
    """What one number of threads gave.

    Attributes:
        timings: by contender.
        differences: largest absolute difference of each output from that of the standard layout through XLA.
    """

    timings: dict[Contender, Timing]
    differences: dict[Contender, float]


def layout_calls(
    layouts: Layouts, attention: SelfAttention, threads: int | None
) -> dict[Contender, Callable[[], Any]]:
    """Contenders whose calls give the attention's output on `layouts.input` as `[1 n d]` or `[1 d 1 n]`.

    Args:
        layouts: what is compared.
        attention: the layer.
        threads: of LiteRT; XLA takes the cores that the process may use.
    """
    calls: dict[Contender, Callable[[], Any]] = {}
    for n in layouts.frames:
        x = layouts.input(n)
        length = np.array([n], np.int32)
        turned = np.asarray(to_channels_first(jnp.asarray(x)))
        forms: list[tuple[str, int, Any, np.ndarray]] = [(STANDARD, 0, attention, x)]
        for chunk in layouts.chunks:
            if chunk < n:
                graph = ChannelsFirstAttention(attention, chunk_size=chunk or None)
                forms.append((CHANNELS_FIRST, chunk, graph, turned))
        for layout, chunk, module, array in forms:
            for runtime, run in zip(RUNTIMES, _runs(module, array, length, threads), strict=True):
                calls[Contender(n, layout, chunk, runtime)] = run
    return calls


def _runs(
    module: Any, x: np.ndarray, length: np.ndarray, threads: int | None
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The module through XLA and through LiteRT: parameters are constants of both programs."""
    graphdef, state = nnx.split(module)

    def function(x, length):
        return nnx.merge(graphdef, state)(x, length)

    compiled = jax.jit(function).lower(x, length).compile()
    shapes = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype)
        for name, array in (("x", x), ("length", length))
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attention.tflite"
        path.write_bytes(to_litert(function, shapes, ["y"]))
        interpreter = load_litert(path, threads)
    on_device = jnp.asarray(x), jnp.asarray(length)
    return lambda: compiled(*on_device), lambda: interpreter(x, length)[0]


def in_standard_layout(contender: Contender, y: np.ndarray) -> np.ndarray:
    """`[1 n d]` of either layout."""
    y = np.asarray(y)
    return y if contender.layout == STANDARD else np.swapaxes(y[:, :, 0], 1, 2)


def measure_layouts(layouts: Layouts, threads: int, repeats: int) -> Measured:
    """Times all contenders in turn; for a process of its own, because it binds the process to so many cores.

    Raises:
        InputError: fewer cores than threads.
    """
    limit_threads(threads)
    calls = layout_calls(layouts, layouts.attention(), threads)
    differences = {}
    for contender, call in calls.items():
        standard = Contender(contender.frames, STANDARD, 0, RUNTIMES[0])
        gap = in_standard_layout(contender, call()) - np.asarray(calls[standard]())
        differences[contender] = float(np.abs(gap).max())
    return Measured(interleave(calls, repeats), differences)


def layout_rows(threads: int, measured: Measured) -> list[dict[str, Any]]:
    """A row for each contender; `over_standard` and `over_xla` are ratios of medians of this run, below 1 is faster.

    Args:
        threads: goes into the rows.
        measured: from `measure_layouts`.
    """
    timings: Mapping[Contender, Timing] = measured.timings
    rows = []
    for contender, timing in timings.items():
        standard = timings[contender._replace(layout=STANDARD, chunk=0)]
        xla = timings[contender._replace(runtime=RUNTIMES[0])]
        rows.append(
            {
                "threads": threads,
                **contender._asdict(),
                "median_ms": timing.median_ms,
                "spread_ms": timing.spread_ms,
                "over_standard": timing.median_ms / standard.median_ms,
                "over_xla": timing.median_ms / xla.median_ms,
                "difference": measured.differences[contender],
            }
        )
    return rows
