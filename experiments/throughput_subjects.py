"""The models that `experiments.throughput` times: each with its loss, batches of noise, and the work of a step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.conversion.seq2seq_task import Seq2SeqTask
from edgespeech.data.batching import Batch
from edgespeech.data.mixtures import MixtureBatch
from edgespeech.evaluation.macs import count_macs
from edgespeech.models.moonshine import Moonshine, MoonshineConfig
from edgespeech.models.sepformer import SepFormer, SepFormerConfig
from edgespeech.models.splitformer import Splitformer, SplitformerConfig
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from edgespeech.ops.cross_entropy import token_cross_entropy
from edgespeech.training.ctc import ctc_objective, weighted_mean
from edgespeech.training.enhancement import si_snr_objective
from edgespeech.training.exits import ExitLossConfig, exit_objective
from edgespeech.types import SAMPLE_RATE

TOKENS_PER_SECOND = 3  # of the targets: about what word pieces have


class Subject(NamedTuple):
    """A model to train.

    Attributes:
        model: with random parameters.
        objective: of its structure; see `make_step`.
        vocab_size: of the targets; 0 for targets that are audio.
        has_statistics: whether its batch norms carry statistics from step to step.
    """

    model: Any
    objective: Callable[[nnx.GraphDef], Any]
    vocab_size: int
    has_statistics: bool = False


def _ctc(config: Wav2Vec2Config) -> Subject:
    return Subject(Wav2Vec2(config, rngs=nnx.Rngs(0)), ctc_objective, config.vocab_size)


def _exits(config: SplitformerConfig) -> Subject:
    def objective(graphdef):
        return exit_objective(graphdef, ExitLossConfig())

    model = Splitformer(config, rngs=nnx.Rngs(0))
    return Subject(model, objective, config.vocab_size, has_statistics=True)


def _enhancement(config: SepFormerConfig) -> Subject:
    return Subject(SepFormer(config, rngs=nnx.Rngs(0)), si_snr_objective, 0)


def _seq2seq(config: MoonshineConfig) -> Subject:
    task = Seq2SeqTask(config.bos_id, config.eos_id)

    def objective(graphdef):
        def loss(params, batch, key, step):
            del key, step
            output = task.forward(nnx.merge(graphdef, params, copy=True), batch)
            labels, lengths = task.labels(batch)
            losses = token_cross_entropy(output.logits, labels, lengths) / lengths
            return weighted_mean(losses, batch.weights), {}

        return loss

    return Subject(Moonshine(config, rngs=nnx.Rngs(0)), objective, config.vocab_size)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "wav2vec2_tiny": lambda: _ctc(Wav2Vec2Config.tiny()),
    "wav2vec2_small": lambda: _ctc(Wav2Vec2Config.small()),
    "wav2vec2_base": lambda: _ctc(Wav2Vec2Config.base()),
    "splitformer_tiny": lambda: _exits(SplitformerConfig.tiny()),
    "splitformer": lambda: _exits(SplitformerConfig.splitformer()),
    "sepformer_tiny": lambda: _enhancement(SepFormerConfig.tiny()),
    "moonshine_tiny": lambda: _seq2seq(MoonshineConfig.tiny()),
    "moonshine_base": lambda: _seq2seq(MoonshineConfig.base()),
}


def noise_batch(subject: Subject, rows: int, seconds: float) -> Any:
    """Rows of noise with random targets, as NumPy arrays."""
    random = np.random.default_rng(0)
    samples = round(seconds * SAMPLE_RATE)
    audio = random.normal(0.0, 0.1, (rows, samples)).astype(np.float32)
    lengths = np.full(rows, samples, np.int32)
    weights, index = np.ones(rows, np.float32), np.arange(rows, dtype=np.int32)
    if not subject.vocab_size:
        return MixtureBatch(audio, lengths, audio[:, None] / 2, weights, index)
    tokens = max(1, int(seconds * TOKENS_PER_SECOND))
    # Neighbours differ: CTC needs no frame for a blank between them.
    targets = 3 + (random.integers(0, 8, (rows, 1)) + np.arange(tokens)) % (subject.vocab_size - 3)
    counts = np.full(rows, tokens, np.int32)
    return Batch(audio, lengths, targets.astype(np.int32), counts, weights, index)


def product_flops(subject: Subject, batch: Any) -> int:
    """FLOPs of all matrix products and convolutions of a step: those of the forward pass, and twice as many back."""
    graphdef, params, statistics = nnx.split(subject.model, nnx.Param, ...)
    loss = subject.objective(graphdef)
    extra = (statistics,) if subject.has_statistics else ()

    def forward(params, batch, key):
        return loss(params, batch, key, jnp.int32(0), *extra)[0]

    return 3 * 2 * count_macs(forward, params, batch, jax.random.key(0)).total()
