"""The split of the time, on a clock of the test's own."""

import jax
import jax.numpy as jnp
import pytest

from edgespeech.data.batching import Batch
from edgespeech.training.timing import Clock, count

DEVICES = 5


def test_seconds_are_split_and_goodput_is_the_part_of_steps_that_counted(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: DEVICES)
    now = [100.0]
    clock = Clock(lambda: now[0])

    def spend(seconds, name=None):
        if name is None:
            now[0] += seconds
            return
        with clock.spent_on(name):
            now[0] += seconds

    spend(4.0)  # reading the checkpoint
    clock.begin()
    spend(10.0, "compile")
    spend(1.0, "data")
    spend(5.0)
    counts = {"utterances": 12.0, "seconds": 36.0, "held_seconds": 48.0}
    assert clock.report(2, 1.0, counts) == pytest.approx(
        {
            "compile_seconds": 5.0,
            "data_seconds": 0.5,
            "checkpoint_seconds": 0.0,
            "compute_seconds": 2.5,
            "utterances_per_second": 12 / 16,
            "utterances_per_second_per_device": 12 / 16 / DEVICES,
            "audio_seconds_per_second": 36 / 16,
            "audio_seconds_per_second_per_device": 36 / 16 / DEVICES,
            "padding": 0.25,
            "goodput": 5 / 20,
        }
    )
    spend(2.0, "checkpoint")
    spend(8.0)
    row = clock.report(4, 0.75, counts)  # one of four steps was skipped
    assert row["checkpoint_seconds"] == pytest.approx(0.5)
    assert row["compute_seconds"] == pytest.approx(2.0)
    assert row["compile_seconds"] == row["data_seconds"] == 0.0
    assert row["goodput"] == pytest.approx((5 + 6) / 30)


def test_filler_rows_do_not_count():
    batch = Batch(
        audio=jnp.zeros((3, 32_000)),
        audio_lengths=jnp.asarray([16_000, 8_000, 32_000]),
        targets=None,
        target_lengths=None,
        weights=jnp.asarray([1.0, 1.0, 0.0]),
        index=None,
    )
    found = {name: float(value) for name, value in count(batch).items()}
    assert found == pytest.approx({"utterances": 2.0, "seconds": 1.5, "held_seconds": 6.0})
