"""Where the time of training goes."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from edgespeech.types import SAMPLE_RATE


class Clock:
    """Adds up the seconds of a stage by what they were spent on.

    `compile` is the first step of each batch shape, `data` waiting for a batch, `checkpoint` what a save keeps training
    from; the rest between two reports is `compute`.

    Args:
        now: seconds, from anywhere.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._start = self._reported = now()
        self._spent: dict[str, float] = {"compile": 0.0, "data": 0.0, "checkpoint": 0.0}
        self._productive = 0.0

    @contextlib.contextmanager
    def spent_on(self, name: str) -> Iterator[None]:
        """Counts the time inside for a name."""
        start = self._now()
        try:
            yield
        finally:
            self._spent[name] += self._now() - start

    def begin(self) -> None:
        """The first step comes now: what was before counts as no step's time."""
        self._reported = self._now()

    def report(self, steps: int, kept: float, counts: dict[str, float]) -> dict[str, float]:
        """The metrics of the steps since the last report, which must have ended.

        Args:
            steps: how many.
            kept: part of them that was not skipped.
            counts: sums over them: see `count`.

        Returns:
            `data_seconds`, `compute_seconds`, `checkpoint_seconds` and `compile_seconds` of a step on average;
            `utterances_per_second` and `audio_seconds_per_second` of all devices, and `..._per_device`; `padding`, the
            part of the batches' samples that is not audio; `goodput`, the part of all seconds of this start of the
            stage, from its checkpoint on, in which steps were computed that counted.
        """
        now = self._now()
        seconds = now - self._reported
        spent = self._spent | {"compute": max(0.0, seconds - sum(self._spent.values()))}
        self._productive += spent["compute"] * kept
        self._reported, self._spent = now, dict.fromkeys(self._spent, 0.0)
        seconds = max(seconds, 1e-9)
        devices = jax.device_count()
        rates = {
            "utterances_per_second": counts["utterances"] / seconds,
            "audio_seconds_per_second": counts["seconds"] / seconds,
        }
        return {
            **{f"{name}_seconds": value / steps for name, value in spent.items()},
            **rates,
            **{f"{name}_per_device": rate / devices for name, rate in rates.items()},
            "padding": 1.0 - counts["seconds"] / max(counts["held_seconds"], 1e-9),
            "goodput": self._productive / max(now - self._start, 1e-9),
        }


@jax.jit
def count(batch: Any) -> dict[str, jax.Array]:
    """What is in a batch of all processes: `utterances`, their `seconds`, and the `held_seconds` with the padding."""
    rows, samples = batch.audio.shape
    return {
        "utterances": jnp.sum(batch.weights),
        "seconds": jnp.sum(batch.weights * batch.audio_lengths) / SAMPLE_RATE,
        "held_seconds": jnp.asarray(rows * samples / SAMPLE_RATE),
    }
