"""The edge Conformer: one model for every latency, live and offline, in float32 and float16, and its variants.

Command     python -m experiments.edge_conformer_librispeech --workdir=runs/edge
Hardware    2 CPU cores; uses every local device it finds
Data        synthetic by default
Expect      WORKDIR/report.md: WER of one model for every chunk size and left context; the same texts streamed as whole;
            float16 beside float32; depthwise-separable beside vanilla subsampling; streaming LPA beside attention,
            with parameters, compute, state and real-time factor of each

On a LibriSpeech tree:

    python -m experiments.edge_conformer_librispeech --workdir=runs/edge --data=folder --data_dir=DIR --preset=watch \\
        --train_split=train-clean-100 --dev_split=dev-clean --test_split=test-clean --batch.batch_seconds=600 \\
        --batch.num_buckets=6 --steps=60000

The model: arXiv 2312.10359, known second-hand; sizes, training and chunk sizes are ours. A model is scored with the
moving average of its parameters.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.data.tokenizer import Tokenizer
from edgespeech.errors import InputError
from edgespeech.evaluation.chunk_decoder import ChunkDecoder, LiveDecoder
from edgespeech.evaluation.edge_plots import wer_against_chunk
from edgespeech.evaluation.edge_report import write_edge_report
from edgespeech.evaluation.macs import count_macs
from edgespeech.evaluation.streaming_latency import state_bytes, streaming_latency
from edgespeech.evaluation.wer import WerResult, paired_bootstrap
from edgespeech.inference.streaming import Streamer
from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.models.edge_conformer_config import EdgeConformerConfig
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.nn.chunk_attention import FULL_CONTEXT, Chunks
from edgespeech.nn.lpa import harden
from edgespeech.training.multitask import multitask_objective
from edgespeech.training.state import OptimizerConfig
from edgespeech.types import SAMPLE_RATE
from experiments import asr, data_flags, distributed_flags, program, run, tokenizer_flags
from experiments.facts import run_facts
from experiments.fit import fit
from experiments.flags import define_config, int_list, read_config

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(data_flags)
flags.adopt_module_key_flags(tokenizer_flags)
PRESETS = {
    "tiny": EdgeConformerConfig.tiny,
    "watch": EdgeConformerConfig.watch,
    "phone": EdgeConformerConfig.phone,
}
# What differs from the first one.
MODELS: dict[str, dict[str, Any]] = {
    "attention": {},
    "vanilla": {"separable": False},
    "lpa": {"mixer": "lpa"},
}

BATCH = BatchConfig(batch_seconds=30, num_buckets=2, speed_factors=(0.9, 1.0, 1.1))
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, clip=5.0, average_decay=0.995)
# At 40 ms a frame, word pieces stay on the plateau of their frequencies throughout the default; characters leave it.
FLAGS.set_default("tokenizer", "char")

# --- models and training
flags.DEFINE_enum(
    "preset", "tiny", sorted(PRESETS), "Sizes of the models; --model.* change single ones."
)
define_config(
    "model",
    EdgeConformerConfig.tiny(),
    skip=("vocab_size", "mixer", "separable", "dtype", "lpa"),
)
define_config("batch", BATCH, skip=("shuffle", "seed", "batch_multiple"))
flags.DEFINE_integer("steps", 2500, "Updates of every model.", lower_bound=1)
define_config("optimizer", OPTIMIZER)
flags.DEFINE_integer("save_every", 200, "Updates between checkpoints.", lower_bound=1)

# --- evaluation
flags.DEFINE_list("chunks", ["4", "8", "16", "32"], "Chunk sizes of the matrix, frames of 40 ms.")
flags.DEFINE_list("lefts", ["1", "4"], "Left contexts of the matrix, chunks.")


def experiment() -> None:
    """The whole job, from data to report."""
    # ---------------------------------------------------------------- settings, checked before anything is computed
    model_config = read_config("model", PRESETS[FLAGS.preset]())
    sizes, lefts = int_list("chunks", 1, 1000), int_list("lefts", 0, 1000)
    if not sizes or not lefts:
        raise InputError("--chunks and --lefts need a number each at least: give some")
    optimizer_config = read_config("optimizer", OPTIMIZER)
    batch_config = dataclasses.replace(
        read_config("batch", BATCH), seed=FLAGS.seed, batch_multiple=run.batch_multiple()
    )
    (split,) = one_split(data_flags.test_splits())
    workdir = run.Workdir(FLAGS.workdir, run.flag_settings(), FLAGS.resume)

    # ---------------------------------------------------------------- data
    with workdir.stage("data"):
        train_set, dev_set, test_sets = data_flags.open_data([split])
        tokenizer = tokenizer_flags.make_tokenizer(train_set)
        model_config = dataclasses.replace(model_config, vocab_size=tokenizer.vocab_size)
        source = BatchSource(train_set, tokenizer, batch_config, model_config.num_frames)
        test = BatchSource(test_sets[split], None, data_flags.whole_batches(batch_config))
        run.say(asr.describe(train_set, dev_set, test_sets, source))
    workdir.begin()

    # ---------------------------------------------------------------- every model: train, listen, measure
    rows, results = [], []
    matrix, streaming, float16 = [], {}, {}
    here = Chunks(model_config.chunk, model_config.left)
    for name, changes in MODELS.items():
        config = dataclasses.replace(model_config, **changes)
        folder = workdir.path / name
        if not (folder / "model.json").exists():
            with workdir.stage(f"{name} training"):
                model = train_model(workdir, name, config, optimizer_config, source)
                facts = {"data": train_set.kind, "steps": FLAGS.steps, "model": name}
                save_pretrained(folder, model, tokenizer, facts)
        model, tokenizer, _ = load_pretrained(folder)
        assert isinstance(model, EdgeConformer)
        assert isinstance(tokenizer, Tokenizer)
        with workdir.stage(f"{name} evaluation"):
            decoder = ChunkDecoder(model, tokenizer)
            state = nnx.state(model)

            def listen(label: str, chunks: Chunks, decoder=decoder, state=state) -> WerResult:
                decoder.chunks = chunks
                return asr.evaluate(workdir.path, label, decoder, state, test)

            result = listen(name, here)
            run.say(f"{name}: WER {result.wer:.2%}")
            if not changes:
                for size in sizes:
                    for left in lefts:
                        found = listen(f"{name}_chunk{size}_left{left}", Chunks(size, left))
                        matrix.append(row_of(size, left, found))
                matrix.append(row_of(None, None, listen(f"{name}_full", FULL_CONTEXT)))
                live = asr.evaluate(
                    workdir.path, f"{name}_streamed", LiveDecoder(model, tokenizer), state, test
                )
                streaming = compared(result, live) | {"chunk": here.size, "left": here.left}
                half = EdgeConformer(
                    dataclasses.replace(config, dtype="float16"), rngs=nnx.Rngs(FLAGS.seed)
                )
                low = ChunkDecoder(half, tokenizer)
                low.chunks = here
                float16 = compared(
                    result, asr.evaluate(workdir.path, f"{name}_float16", low, state, test)
                )
            results.append(result)
            rows.append(
                {
                    "name": name,
                    "parameters": count_parameters(model),
                    "wer": result.wer,
                    "ci": list(result.ci),
                    "config": dataclasses.asdict(config),
                }
                | costs(model, tokenizer)
            )

    # ---------------------------------------------------------------- report
    for row, result in zip(rows, results, strict=True):
        paired = paired_bootstrap(results[0], result)
        row |= {"difference": paired.difference, "difference_ci": list(paired.ci)}
    corpora = (train_set, dev_set, *test_sets.values())
    report = run_facts(workdir, FLAGS.seed) | {
        "title": "one model for every latency",
        "data": asr.data_facts(train_set, dev_set, test_sets, source, [test]),
        "matrix": matrix,
        "streaming": streaming,
        "float16": float16,
        "models": rows,
        "notes": [note for corpus in corpora for note in corpus.notes],
    }
    note = f"{train_set.kind} data"
    wer_against_chunk(workdir.path / "plots" / "wer_chunk.png", matrix, note)
    asr.draw_losses(workdir.path, note)
    write_edge_report(workdir.path, report)
    run.say(f"report: {workdir.path / 'report.md'}")


def one_split(splits: list[str]) -> list[str]:
    """The split that everything is measured on.

    Raises:
        InputError: there are several.
    """
    if len(splits) != 1:
        raise InputError(
            f"--test_split={FLAGS.test_split} names {len(splits)} splits: give one; several joined by + count as one"
        )
    return splits


def train_model(
    workdir: run.Workdir,
    name: str,
    config: EdgeConformerConfig,
    optimizer_config: OptimizerConfig,
    source: BatchSource,
) -> EdgeConformer:
    """A model with the moving average of its parameters, LPA hard; seed, data order and steps are those of all."""
    model = EdgeConformer(config, rngs=nnx.Rngs(FLAGS.seed))
    graphdef, params, other = nnx.split(model, nnx.Param, ...)
    average, _ = fit(
        name,
        multitask_objective(graphdef, other, FLAGS.steps),
        params,
        source,
        FLAGS.steps,
        workdir=workdir.path,
        settings={"model": dataclasses.asdict(config)},
        optimizer=optimizer_config,
        seed=FLAGS.seed,
        loop=distributed_flags.loop_config(),
    )
    model = nnx.merge(graphdef, average, other)
    if config.mixer == "lpa":
        harden(model)
    return model


def row_of(size: int | None, left: int | None, result: WerResult) -> dict[str, Any]:
    """A cell of the matrix."""
    return {"size": size, "left": left, "wer": result.wer, "ci": list(result.ci)}


def compared(one: WerResult, other: WerResult) -> dict[str, Any]:
    """Both word error rates, and how many texts differ."""
    texts = zip(one.utterances, other.utterances, strict=True)
    return {
        "wer": [one.wer, other.wer],
        "different": sum(a.hypothesis != b.hypothesis for a, b in texts),
        "utterances": len(one.utterances),
    }


def costs(model: EdgeConformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """Multiply-accumulates for a second of audio, bytes and time of one stream."""
    seconds = 10
    audio = jax.ShapeDtypeStruct((1, seconds * SAMPLE_RATE), np.float32)
    lengths = jax.ShapeDtypeStruct((1,), np.int32)
    graphdef, state = nnx.split(model)

    def encode(state, audio, lengths):
        return nnx.merge(graphdef, state)(audio, lengths).logits

    streamer = Streamer(model, tokenizer)
    return {
        "macs_per_second": count_macs(encode, state, audio, lengths).total() / seconds,
        "state_bytes": state_bytes(model),
        "real_time_factor": streaming_latency(streamer, 1).real_time_factor,
    }


if __name__ == "__main__":
    program.main(experiment)
