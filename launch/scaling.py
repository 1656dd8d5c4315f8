"""What limits an epoch of LibriSpeech 960 h on 8, 64 and 512 chips: the arithmetic of docs/scaling.md.

Command     python -m launch.scaling
Hardware    any CPU: nothing is trained, the models are traced without arrays
Time        a minute
Expect      the tables of docs/scaling.md

Measured here: the rate of the data pipeline. Published: what chips and links do at their best. Assumed: the share of a
chip's peak that training reaches, the rate of the storage, the cores of a host. Everything else is computed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.data.batching import Batch
from edgespeech.evaluation.macs import count_macs
from edgespeech.evaluation.report_text import table
from edgespeech.models.moonshine import Moonshine, MoonshineConfig
from edgespeech.models.sepformer import SepFormer, SepFormerConfig
from edgespeech.models.splitformer import Splitformer, SplitformerConfig
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config, count_parameters
from edgespeech.types import SAMPLE_RATE

# LibriSpeech's three training splits (Panayotov et al., 2015): 281,241 utterances.
HOURS, UTTERANCES = 960.9, 281_241
ROW_SECONDS = HOURS * 3600 / UTTERANCES
BATCH_SECONDS = (
    1.6 * 3600
)  # all chips together, as wav2vec 2.0's base model (arXiv 2006.11477, section 4.2)

# Measured on 2026-11-20, one core of an AMD EPYC, FLAC of real LibriSpeech, change of speed and padding included:
# python -m experiments.throughput --models= --data_dir=LibriSpeech --split=dev-mini --data_seconds=40
DATA_RATE = 808.0  # seconds of audio a core-second

# Assumed.
UTILISATION = 0.4  # of the chip's peak: what the project aims at for wav2vec2-base
STORAGE_RATE = 1e9  # bytes a second of one host's checkpoints to shared storage
SAVE_EVERY = 200  # steps, the programs' default
CHIPS = (8, 64, 512)


class Chip(NamedTuple):
    """Published peak rates.

    Attributes:
        name: of the chip.
        flops: a second, dense bfloat16.
        link: bytes a second that a chip sends to chips of its island.
        island: chips that such links join; None for all.
        network: bytes a second that a chip sends beyond its island.
        per_host: chips of a host.
        cores: of a host, assumed to be free for data.
    """

    name: str
    flops: float
    link: float
    island: int | None
    network: float
    per_host: int
    cores: int


# Google Cloud's documentation of TPU v5e: 197 TFLOP/s, interconnect 1600 Gbit/s a chip; ct5lp-hightpu-4t: 112 vCPUs.
TPU_V5E = Chip("TPU v5e", 197e12, 1600e9 / 8, None, 0.0, 4, 56)
# NVIDIA's data sheets of H100 SXM and DGX H100: 989 TFLOP/s dense, NVLink 900 GB/s of both directions, one 400 Gbit/s
# port a GPU, 112 cores.
H100 = Chip("H100 SXM", 989e12, 450e9, 8, 400e9 / 8, 8, 56)


class Model(NamedTuple):
    """A model's size and work: parameters, and MACs of the forward pass for an utterance of ROW_SECONDS."""

    name: str
    parameters: int
    macs: int


class Step(NamedTuple):
    """A training step, seconds unless said otherwise.

    Attributes:
        batch_seconds: of audio, on all chips.
        steps: of an epoch.
        compute: forward and backward pass.
        collective: the sum of the gradients over the chips.
        cores: that a host needs for its data.
        write: of a checkpoint, in the background.
        between: from one checkpoint to the next.
        limit: what is in the way.
    """

    batch_seconds: float
    steps: int
    compute: float
    collective: float
    cores: float
    write: float
    between: float
    limit: str


def all_reduce(size: float, chip: Chip, count: int) -> float:
    """Seconds to sum `size` bytes over the chips by rings: `2 (n - 1) / n size / rate`, latency left out.

    Islands first reduce and scatter, then sum their parts over the network, then gather.
    """
    island = min(count, chip.island or count)
    inside = 2 * (island - 1) / island * size / chip.link
    islands = count // island
    if islands == 1:
        return inside
    return inside + 2 * (islands - 1) / islands * (size / island) / chip.network


def training_step(model: Model, chip: Chip, count: int) -> Step:
    """A step of a batch of BATCH_SECONDS, or of one utterance a chip if that is more.

    A backward pass has twice the work of the forward one. Gradients are float32, and are summed when all are there:
    they leave the backward pass as one vector. A checkpoint holds parameters, their average and two moments, float32.
    """
    batch_seconds = max(BATCH_SECONDS, count * ROW_SECONDS)
    steps = math.ceil(HOURS * 3600 / batch_seconds)
    flops = 3 * 2 * model.macs * batch_seconds / ROW_SECONDS
    compute = flops / (count * chip.flops * UTILISATION)
    collective = all_reduce(4 * model.parameters, chip, count)
    hosts = -(-count // chip.per_host)
    step = compute + collective
    cores = batch_seconds / hosts / DATA_RATE / step
    write = 16 * model.parameters / STORAGE_RATE
    # The data holds a step up only where the cores do not suffice.
    between = SAVE_EVERY * step * max(1.0, cores / chip.cores)
    if cores > chip.cores:
        limit = "data"
    elif write > between:
        limit = "checkpoints"
    else:
        limit = "collectives" if collective > compute else "compute"
    return Step(batch_seconds, steps, compute, collective, cores, write, between, limit)


def epoch_seconds(step: Step, chip: Chip) -> float:
    """Seconds of an epoch: the steps, held up by what cannot keep pace with them."""
    held_up = max(1.0, step.cores / chip.cores, step.write / step.between)
    return step.steps * (step.compute + step.collective) * held_up


def trace(name: str, build: Callable[[], Any], call: Callable[[Any, Batch], Any]) -> Model:
    """Counts a model without making its arrays."""
    model = nnx.eval_shape(build)
    model.scan_layers = True
    graphdef, state = nnx.split(model)
    samples, tokens = round(ROW_SECONDS * SAMPLE_RATE), 40

    def forward(state, audio, lengths, targets, target_lengths):
        batch = Batch(audio, lengths, targets, target_lengths, None, None)
        return call(nnx.merge(graphdef, state), batch)

    counts = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1,), (1, tokens), (1,))]
    shapes = [jax.ShapeDtypeStruct((1, samples), jnp.float32), *counts]
    return Model(name, count_parameters(model), count_macs(forward, state, *shapes).total())


def models() -> list[Model]:
    """The models of the tables; all train on 16 kHz, Moonshine with 40 tokens an utterance."""

    def listen(model, batch):
        return model(batch.audio, batch.audio_lengths)

    def transcribe(model, batch):
        return model(batch.audio, batch.audio_lengths, batch.targets, batch.target_lengths)

    def rngs():
        return nnx.Rngs(0)

    sepformer = SepFormerConfig(sample_rate=SAMPLE_RATE)
    exits = SplitformerConfig.splitformer()
    return [
        trace("wav2vec2 small", lambda: Wav2Vec2(Wav2Vec2Config.small(), rngs=rngs()), listen),
        trace("wav2vec2 base", lambda: Wav2Vec2(Wav2Vec2Config.base(), rngs=rngs()), listen),
        trace("Splitformer", lambda: Splitformer(exits, rngs=rngs()), listen),
        trace("SepFormer", lambda: SepFormer(sepformer, rngs=rngs()), listen),
        trace("Moonshine base", lambda: Moonshine(MoonshineConfig.base(), rngs=rngs()), transcribe),
    ]


def render(models: list[Model]) -> str:
    """The tables in Markdown."""
    sizes = [
        [m.name, f"{m.parameters / 1e6:.1f}", f"{6e-9 * m.macs / ROW_SECONDS:.1f}"] for m in models
    ]
    header = ["model", "parameters, M", "GFLOP of training a second of audio"]
    blocks = [table("Work", header, sizes)]
    for chip in (TPU_V5E, H100):
        rows = []
        for model in models:
            for count in CHIPS:
                step = training_step(model, chip, count)
                rows.append(
                    [
                        *(model.name, count, f"{step.batch_seconds / 3600:.1f}"),
                        *(f"{1000 * step.compute:.1f}", f"{1000 * step.collective:.1f}"),
                        *(f"{step.cores:.1f}", f"{step.write:.1f} / {step.between:.1f}"),
                        *(f"{epoch_seconds(step, chip) / 60:.2f}", step.limit),
                    ]
                )
        header = [
            *("model", "chips", "batch, h", "compute, ms", "gradients, ms", "cores a host"),
            *("checkpoint: write / between, s", "epoch, min", "limit"),
        ]
        blocks.append(
            table(f"{chip.name}, {chip.cores} cores a host of {chip.per_host}", header, rows)
        )
    return "\n\n".join(blocks)


if __name__ == "__main__":
    print(render(models()))
