"""From a budget that is set at run time to the deepest exit that fits it."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from edgespeech.errors import InputError
from edgespeech.evaluation.macs import count_macs
from edgespeech.inference.early_exit import EarlyExit, ExitModel
from edgespeech.inference.exit_policy import ExitPolicy, exit_for_budget
from edgespeech.types import SAMPLE_RATE, Audio


def exit_compute(model: ExitModel, seconds: float) -> list[int]:
    """Multiply-accumulates up to each exit for an utterance of so many seconds, counted in the traced program."""
    audio = jax.ShapeDtypeStruct((1, round(seconds * SAMPLE_RATE)), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    x, _ = jax.eval_shape(model.embed, audio, lengths)
    macs = [count_macs(model.embed, audio, lengths).total()]
    for block, head in zip(model.blocks, model.heads, strict=True):
        macs.append(sum(count_macs(part, x, lengths).total() for part in (block, head)))
    return np.cumsum(macs)[1:].tolist()


def exit_within_compute(model: ExitModel, budget: float, seconds: float = 10.0) -> int:
    """The deepest exit that takes at most a share of a whole pass, counted from 1.

    Args:
        model: with exits.
        budget: share of the multiplications of the last exit, above 0.
        seconds: of audio; attention makes the shares depend on it a little.

    Raises:
        InputError: not even the first exit fits.
    """
    costs = exit_compute(model, seconds)
    return exit_for_budget([cost / costs[-1] for cost in costs], budget)


def exit_within_deadline(
    model: ExitModel, deadline_ms: float, seconds: float = 10.0, repeats: int = 5
) -> tuple[int, list[float]]:
    """The deepest exit that takes at most so many milliseconds a second of audio on this machine, counted from 1.

    Every exit is timed at batch 1 on noise, after a call that compiles it.

    Args:
        model: with exits.
        deadline_ms: milliseconds per second of audio.
        seconds: of audio that is timed.
        repeats: timed calls of each exit; their median counts.

    Returns:
        The exit, and the milliseconds per second of every exit.

    Raises:
        InputError: not even the first exit is fast enough.
    """
    if not deadline_ms > 0:
        raise InputError(
            f"the deadline is {deadline_ms:g} ms a second of audio: it must be above 0"
        )
    samples = round(seconds * SAMPLE_RATE)
    noise = np.random.default_rng(0).standard_normal((1, samples))
    audio = jnp.asarray(0.1 * noise, jnp.float32)
    run = EarlyExit(model, ExitPolicy("max_probability", np.inf))
    times = [
        _median_ms(run, audio, exit, repeats) / seconds for exit in range(1, run.num_exits + 1)
    ]
    # An exit is never cheaper than one before it; a clock may say so.
    return exit_for_budget(np.maximum.accumulate(times).tolist(), deadline_ms), times


def _median_ms(run: EarlyExit, audio: Audio, exit: int, repeats: int) -> float:
    times, lengths = [], jnp.asarray([audio.shape[1]])
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run(audio, lengths, exit)
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times[1:]))
