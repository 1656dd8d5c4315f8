"""The costs of live transcription, by a clock that is set by hand."""

import dataclasses
import itertools

import pytest
from flax import nnx

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.evaluation.streaming_latency import state_bytes, streaming_latency
from edgespeech.inference.streaming import Streamer
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.models.edge_conformer_config import EdgeConformerConfig

CONFIG = dataclasses.replace(
    EdgeConformerConfig.tiny(),
    vocab_size=3,
    num_mels=7,
    width=4,
    num_layers=1,
    num_heads=2,
    ffn_width=4,
    conv_kernel=3,
    chunk=2,
    left=3,
)


@pytest.fixture(scope="module")
def model():
    return EdgeConformer(CONFIG, rngs=nnx.Rngs(0))


def test_times_of_a_stream(model):
    streamer = Streamer(model, CharTokenizer(["<pad>", "|", "A"]), num_streams=2)
    # Seconds of each step; the first two are warm-up.
    took = [9.0, 9.0, 0.010, 0.030, 0.020, 0.060]
    ticks = itertools.accumulate(itertools.chain.from_iterable((0.5, step) for step in took))
    got = streaming_latency(streamer, 2, 4, clock=lambda: next(ticks))
    assert got.chunk_seconds == 0.08
    assert got.step.median_ms == pytest.approx(25.0)
    assert got.slowest_ms == pytest.approx(60.0)
    assert got.real_time_factor == pytest.approx(0.025 / 0.08)
    assert got.wait_seconds == pytest.approx(0.14)
    with pytest.raises(InputError, match="steps is 0"):
        streaming_latency(streamer, 2, 0)


def test_bytes_of_a_stream(model):
    samples, norm, frames = 240, 2 * 7 + 1, 3 * 7
    keys_and_values, seen, conv = 2 * 3 * 2 * 4, 1, 1 * 4
    assert state_bytes(model) == 4 * (samples + norm + frames + keys_and_values + seen + conv)
