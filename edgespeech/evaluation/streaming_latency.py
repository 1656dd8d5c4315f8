"""What live transcription costs: the time of a chunk, how long a word may wait, and what a stream remembers."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from edgespeech.errors import InputError
from edgespeech.evaluation.latency import Timing, real_time_factor, summarise
from edgespeech.inference.streaming import Streamer
from edgespeech.types import SAMPLE_RATE


class StreamingLatency(NamedTuple):
    """Costs of a `Streamer` whose streams are all fed at once.

    Attributes:
        chunk_seconds: audio of one step.
        step: time of one step with its host work, ms.
        slowest_ms: the slowest step.
        real_time_factor: median time of a step over its audio; with several streams, for all of them together.
        wait_seconds: from when a word is spoken to when it is shown, at most: a chunk and the slowest step.
    """

    chunk_seconds: float
    step: Timing
    slowest_ms: float
    real_time_factor: float
    wait_seconds: float


def streaming_latency(
    streamer: Streamer,
    num_streams: int,
    steps: int = 50,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> StreamingLatency:
    """Feeds noise chunk by chunk to new streams, and times every step after two of warm-up.

    Args:
        streamer: its streams are reset, and left open.
        num_streams: how many of them are fed, from 0 on.
        steps: that are timed.
        clock: seconds.

    Raises:
        InputError: no steps.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}: a median needs at least 1")
    for stream in range(num_streams):
        streamer.reset(stream)
    samples = round(streamer.chunk_seconds * SAMPLE_RATE)
    noise = np.random.default_rng(0).normal(0.0, 0.1, (num_streams, samples)).astype(np.float32)
    blocks = dict(enumerate(noise))
    seconds = []
    for _ in range(2 + steps):
        start = clock()
        streamer.feed(blocks)
        seconds.append(clock() - start)
    timing = summarise(seconds[2:])
    slowest = max(seconds[2:])
    return StreamingLatency(
        streamer.chunk_seconds,
        timing,
        slowest * 1e3,
        real_time_factor(timing.median_ms, streamer.chunk_seconds),
        streamer.chunk_seconds + slowest,
    )


def state_bytes(model: Any) -> int:
    """Bytes that a streaming module keeps for one stream, which do not grow with its length."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda: model.init_state(1)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
