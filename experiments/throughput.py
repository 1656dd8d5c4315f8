"""How fast models train here: steps on synthetic batches, beside the device's own matrix product and the data's rate.

Command     python -m experiments.throughput [--models=wav2vec2_tiny,splitformer_tiny] [--json=throughput.json]
Hardware    whatever JAX finds; it uses all devices of this process
Time        some minutes on 2 CPU cores for the tiny models, most of it compilation; wav2vec2_base takes a GPU's memory
Expect      a table: utterances and seconds of audio a second, achieved FLOP/s and their share of the measured matrix
            product, the part of the transfer to the device that hides behind computing, how often the data pipeline is
            faster than computing, and the memory that XLA plans. A compilation after the warm-up is an error: status 1

The FLOPs of a step are those that XLA counts in the program before it optimises it, with all layers written out. XLA
counts the body of a loop once. The count of all products of the model itself, three times those of its forward pass,
stands beside it. A network sees noise of one length; the parameters are random; neither changes the time.
"""

import datetime
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile
from absl import flags
from flax import nnx
from jax.flatten_util import ravel_pytree

from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.data.folder import FolderCorpus
from edgespeech.errors import InputError
from edgespeech.evaluation.machine import device, versions
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.nn.remat import rematerialised
from edgespeech.training.sharding import Layout, make_mesh, shard_rows
from edgespeech.training.state import (
    OptimizerConfig,
    StepFunction,
    TrainState,
    init_state,
    make_optimizer,
    make_step,
)
from edgespeech.types import SAMPLE_RATE
from experiments import program
from experiments.throughput_subjects import SUBJECTS, noise_batch, product_flops

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)

UTTERANCES = 64  # of the data pipeline's own audio
_COMPILED = "/jax/core/compile/backend_compile_duration"


flags.DEFINE_list(
    "models",
    ["wav2vec2_tiny", "splitformer_tiny", "sepformer_tiny"],
    f"Models to time, parted by commas: {', '.join(SUBJECTS)}; none: the data pipeline alone.",
)
flags.DEFINE_float("seconds", 12.0, "Audio of every row, seconds.", lower_bound=0.5)
flags.DEFINE_integer("rows", 4, "Rows of a batch, on every device.", lower_bound=1)
flags.DEFINE_integer("steps", 10, "Timed steps.", lower_bound=1)
flags.DEFINE_integer("accumulate", 1, "Steps whose gradients make one update.", lower_bound=1)
flags.DEFINE_bool("scan_layers", True, "Compile equal neighbouring layers once.")
flags.DEFINE_bool("remat", False, "Compute the inside of every layer again in the backward pass.")
flags.DEFINE_bool("donate", True, "Let every step write over the state that it gets.")
flags.DEFINE_integer("matmul_size", 2048, "Rows and columns of the matrix product.", lower_bound=64)
flags.DEFINE_string(
    "data_dir",
    None,
    "LibriSpeech tree that the data pipeline reads (default: FLAC of tones and noise, made here).",
)
flags.DEFINE_string("split", "train", "Split of --data_dir.")
flags.DEFINE_integer("threads", 2, "Threads that decode audio.", lower_bound=1)
flags.DEFINE_float("data_seconds", 5.0, "Time the data pipeline so long.", lower_bound=0.1)
flags.DEFINE_string("json", None, "Write the results here as well.")


# ------------------------------------------------------------------------------- what is measured


class Compilations:
    """Counts the programs that XLA compiles from its making on; a cached one counts too."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_) -> None:
        del duration_secs
        self.count += event == _COMPILED


def matmul_rate(size: int) -> float:
    """FLOP/s of one device in a product of two float32 matrices, the best of five turns of eight products each."""
    left, right = (jax.random.normal(jax.random.key(i), (size, size)) for i in range(2))

    @jax.jit
    def products(x, y):
        for _ in range(8):
            x = x @ y / size**0.5
        return x

    times = []
    for _ in range(6):
        start = time.perf_counter()
        products(left, right).block_until_ready()
        times.append(time.perf_counter() - start)
    return 8 * 2 * size**3 / min(times[1:])  # the first turn compiles


def time_model(name: str, compilations: Compilations) -> dict[str, Any]:
    """One row of the result.

    Raises:
        RuntimeError: something was compiled after the warm-up.
    """
    subject = SUBJECTS[name]()
    mesh = make_mesh()
    batch = noise_batch(subject, FLAGS.rows * jax.local_device_count(), FLAGS.seconds)

    def build(scan_layers: bool) -> tuple[StepFunction, TrainState]:
        subject.model.scan_layers = scan_layers
        graphdef, params, statistics = nnx.split(subject.model, nnx.Param, ...)
        optimizer = make_optimizer(OptimizerConfig(accumulate=FLAGS.accumulate), 1000, params)
        extra = statistics if subject.has_statistics else None
        unravel = ravel_pytree(params)[1]
        step = make_step(subject.objective(graphdef), unravel, optimizer, average_decay=0.999)
        return step, init_state(params, optimizer, extra)

    on_device = shard_rows(batch, mesh)
    step, state = build(scan_layers=False)
    with jax.set_mesh(mesh):
        lowered = jax.jit(step).lower(state, on_device, jax.random.key(0))
    flops = float(lowered.cost_analysis()["flops"])  # pyright: ignore[reportOptionalSubscript]
    step, state = build(FLAGS.scan_layers)
    layout = Layout(mesh, state, state.params.size)
    state, key = layout.place(state), layout.key(0)

    run = layout.jit(step, FLAGS.donate)
    start = time.perf_counter()
    with rematerialised(FLAGS.remat):
        for _ in range(2 * FLAGS.accumulate):
            state, metrics = run(state, on_device, key)
        loss = float(metrics["loss"])
        compile_seconds = time.perf_counter() - start
        memory = step_memory(layout.compiler(step, FLAGS.donate)(state, on_device, key))
    if not np.isfinite(loss):
        raise RuntimeError(f"{name}: the loss is {loss}")

    def seconds_of(batches: Iterator[Any]) -> float:
        nonlocal state
        count, begin = 0, time.perf_counter()
        for ready in batches:
            state, _ = run(state, ready, key)
            count += 1
        jax.block_until_ready(state)
        return (time.perf_counter() - begin) / count

    warm = compilations.count
    resident = seconds_of(on_device for _ in range(FLAGS.steps))
    streamed = seconds_of(shard_rows(batch, mesh) for _ in range(FLAGS.steps))
    transfers = []
    for _ in range(FLAGS.steps):
        begin = time.perf_counter()
        jax.block_until_ready(shard_rows(batch, mesh))
        transfers.append(time.perf_counter() - begin)
    compiled = compilations.count - warm
    if compiled:
        raise RuntimeError(f"{name}: {compiled} programs were compiled after the warm-up")
    transfer = statistics.median(transfers)
    rows = batch.audio.shape[0]
    return {
        "model": name,
        "parameters": count_parameters(subject.model),
        "rows": rows,
        "seconds": FLAGS.seconds,
        "compile_s": compile_seconds,
        "memory_mb": memory / 1e6,
        "step_s": streamed,
        "resident_step_s": resident,
        "transfer_s": transfer,
        "transfer_hidden": hidden(streamed, resident, transfer),
        "utterances_per_s": rows / streamed,
        "audio_s_per_s": rows * FLAGS.seconds / streamed,
        "step_flops": flops,
        "product_flops": product_flops(subject, batch),
        "compiled_after_warm_up": compiled,
    }


def step_memory(compiled: Any) -> int:
    """Bytes of a step on one device by XLA's plan: state, batch, results and what lies between; shared ones once."""
    plan = compiled.memory_analysis()
    sizes = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return sizes - plan.alias_size_in_bytes


def hidden(streamed: float, resident: float, transfer: float) -> float:
    """The part of a transfer that costs a step nothing, in [0, 1]."""
    return float(np.clip(1.0 - (streamed - resident) / transfer, 0.0, 1.0))


def write_tones(folder: Path) -> None:
    """A LibriSpeech tree with the split "train": tones in noise, 8 to 16 s each."""
    random = np.random.default_rng(0)
    chapter = folder / "train" / "1" / "1"
    chapter.mkdir(parents=True)
    lines = []
    for number in range(UTTERANCES):
        time_axis = np.arange(int(random.uniform(8, 16) * SAMPLE_RATE)) / SAMPLE_RATE
        pitch = 2 * np.pi * random.uniform(90, 250) * time_axis
        voice = sum(np.sin(k * pitch) / k for k in range(1, 20))
        audio = 0.1 * voice * np.sin(2 * np.pi * 2 * time_axis) ** 2
        audio += random.normal(0, 0.003, audio.shape)
        soundfile.write(chapter / f"1-1-{number:04d}.flac", audio, SAMPLE_RATE)
        lines.append(f"1-1-{number:04d} TONES\n")
    (chapter / "1-1.trans.txt").write_text("".join(lines))


def data_rate(data_dir: str | Path, split: str) -> dict[str, float]:
    """Rate of the training's own pipeline: decoding, change of speed, padding; nothing is kept in memory."""
    with tempfile.TemporaryDirectory() as cache:
        corpus = FolderCorpus(data_dir, split, cache_dir=cache, cache_mb=0)
        config = BatchConfig(batch_seconds=60, max_seconds=30, speed_factors=(0.9, 1.0, 1.1))
        source = BatchSource(corpus, None, config)
        steps = source.iterator(0, 10**9, threads=FLAGS.threads)
        next(steps)  # starts the threads
        utterances = samples = 0
        begin, cpu_begin = time.perf_counter(), time.process_time()
        for _, batch in steps:
            utterances += int(batch.weights.sum())
            samples += int(batch.audio_lengths[batch.weights > 0].sum())
            elapsed = time.perf_counter() - begin
            if elapsed > FLAGS.data_seconds:
                break
        cpu = time.process_time() - cpu_begin
        steps.close()
    return {
        "threads": FLAGS.threads,
        "utterances_per_s": utterances / elapsed,
        "audio_s_per_s": samples / SAMPLE_RATE / elapsed,
        # Of a core that has nothing else to do, whatever else ran here.
        "audio_s_per_cpu_s": samples / SAMPLE_RATE / cpu,
    }


# ------------------------------------------------------------------------------- the program


def complete(row: dict[str, Any], matmul: float, data: dict[str, float]) -> dict[str, Any]:
    """The row with what follows from it: FLOP/s a device, its share of the matrix product, data against compute."""
    achieved = row["step_flops"] / row["step_s"] / jax.local_device_count()
    products = row["product_flops"] / row["step_s"] / jax.local_device_count()
    return row | {
        "flops_per_s": achieved,
        "share_of_matmul": achieved / matmul,
        "product_share_of_matmul": products / matmul,
        "data_over_compute": data["audio_s_per_s"] / row["audio_s_per_s"],
    }


def render(result: dict[str, Any]) -> str:
    """The tables of the terminal."""
    data, place = result["data"], result["device"]
    lines = [
        f"Training steps on {place['count']} x {place['kind']}, {place['cores']} CPU cores, "
        f"{result['date']}, jax {result['versions']['jax']}",
        f"matrix product: {result['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s a device, precision "
        f"{result['settings']['matmul_precision'] or 'default'}",
        f"data pipeline, {data['threads']} threads: {data['utterances_per_s']:.0f} utterances/s, "
        f"{data['audio_s_per_s']:.0f} s of audio a second, {data['audio_s_per_cpu_s']:.0f} a core-second",
        "",
        f"{'model':18}{'utt/s':>9}{'audio s/s':>11}{'step ms':>10}{'GFLOP/s':>9}{'of matmul':>11}"
        f"{'products':>10}{'hidden':>8}{'data/compute':>14}{'MB':>8}{'compile s':>11}",
    ]
    lines += [
        f"{row['model']:18}{row['utterances_per_s']:9.2f}{row['audio_s_per_s']:11.1f}"
        f"{1000 * row['step_s']:10.1f}{row['flops_per_s'] / 1e9:9.1f}{row['share_of_matmul']:11.1%}"
        f"{row['product_share_of_matmul']:10.1%}{row['transfer_hidden']:8.0%}"
        f"{row['data_over_compute']:14.1f}{row['memory_mb']:8.0f}{row['compile_s']:11.1f}"
        for row in result["results"]
    ]
    return "\n".join(lines)


def experiment() -> None:
    """Check the flags, time everything, report."""
    unknown = [name for name in FLAGS.models if name not in SUBJECTS]
    if unknown:
        raise InputError(f"--models holds {unknown[0]!r}: choose from {', '.join(SUBJECTS)}")
    if FLAGS.json and not Path(FLAGS.json).parent.is_dir():
        raise InputError(f"--json={FLAGS.json}: there is no folder {Path(FLAGS.json).parent}")
    compilations = Compilations()
    if FLAGS.data_dir:
        data = data_rate(FLAGS.data_dir, FLAGS.split)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_tones(Path(folder))
            data = data_rate(folder, "train")
    matmul = matmul_rate(FLAGS.matmul_size)
    rows = [complete(time_model(name, compilations), matmul, data) for name in FLAGS.models]
    names = (
        *("accumulate", "matmul_precision", "scan_layers", "remat", "donate"),
        *("matmul_size", "steps"),
    )
    result = {
        "results": rows,
        "data": data,
        "matmul_flops_per_s": matmul,
        "settings": {name: FLAGS[name].value for name in names},
        "versions": versions(),
        "device": device(),
        "date": datetime.date.today().isoformat(),
        "command": program.command_line(),
    }
    print(render(result))
    if FLAGS.json:
        program.write_json(FLAGS.json, result)


if __name__ == "__main__":
    program.main(experiment)
