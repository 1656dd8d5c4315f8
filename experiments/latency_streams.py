"""Timing of models that are fed live audio."""

import dataclasses
from collections.abc import Iterable

from absl import flags
from flax import nnx

from edgespeech.evaluation.latency import limit_threads
from edgespeech.evaluation.streaming_latency import state_bytes, streaming_latency
from edgespeech.inference.streaming import Streamer
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.models.edge_conformer_config import EdgeConformerConfig
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.nn.lpa import harden
from experiments.latency_run import facts, say, write_json
from experiments.latency_tables import render_streams

FLAGS = flags.FLAGS
# Models that stream.
STREAM_MODELS = {
    "edge_tiny": EdgeConformerConfig.tiny,
    "edge_watch": EdgeConformerConfig.watch,
    "edge_phone": EdgeConformerConfig.phone,
}

flags.DEFINE_bool(
    "streaming", False, "Feed audio chunk by chunk, to attention and to LPA: for the edge models."
)
flags.DEFINE_integer(
    "chunk", 16, "Frames of 40 ms of a chunk, with --streaming.", lower_bound=1, upper_bound=1000
)
flags.DEFINE_integer("streams", 1, "Streams in one batch, with --streaming.", 1, 1024)


class AnyWords:
    """Stands in for a tokenizer: every second token starts a word, the others go on with one; 0 is the blank."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def decode(self, ids: Iterable[int]) -> str:
        """Numbers."""
        return "".join(f"{' ' if i % 2 == 0 else ''}{i}" for i in ids if i).strip()


def time_streams() -> None:
    """A streaming model with attention and with LPA: time of a chunk, longest wait, memory of a stream."""
    threads, rows = limit_threads(FLAGS.threads), []
    for mixer in ("attention", "lpa"):
        config = dataclasses.replace(STREAM_MODELS[FLAGS.model](), mixer=mixer)
        say(f"{FLAGS.model}, {mixer}: building, compiling")
        model = EdgeConformer(config, rngs=nnx.Rngs(0))
        model.set_chunks(FLAGS.chunk, config.left)
        if mixer == "lpa":
            harden(model)
        streamer = Streamer(model, AnyWords(config.vocab_size), num_streams=FLAGS.streams)
        found = streaming_latency(streamer, FLAGS.streams, 10 * FLAGS.repeats)
        rows.append(
            {
                "model": FLAGS.model,
                "mixer": mixer,
                "parameters": count_parameters(model),
                "streams": FLAGS.streams,
                "chunk_seconds": found.chunk_seconds,
                "median_ms": found.step.median_ms,
                "spread_ms": found.step.spread_ms,
                "slowest_ms": found.slowest_ms,
                "real_time_factor": found.real_time_factor,
                "wait_seconds": found.wait_seconds,
                "state_bytes": state_bytes(model),
            }
        )
    result = {"streaming": rows} | facts(threads)
    print(render_streams(result))
    write_json(result)
