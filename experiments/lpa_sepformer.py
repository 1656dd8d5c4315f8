"""Replace the intra-chunk attention of a SepFormer by Learnable Pulse Accumulation and report what it costs in SI-SNR.

Command     python -m experiments.lpa_sepformer --workdir=runs/sepformer
Needs       pip install 'edgespeech[enhancement]' for PESQ and STOI; without, the report says so
Hardware    2 CPU cores; uses every local device it finds
Time        at most 15 minutes on 2 idle cores with the default, synthetic speech and generated noise
Expect      WORKDIR/report.md: SI-SNR improvement, PESQ and STOI of the teacher and of hybrids with 4, 8, 12 and all 16
            intra-chunk layers replaced, beside three controls at 16; the whole test set as WAV in WORKDIR/audio

Real speech and recorded noise (every fifth file of noise is kept for the test):

    python -m experiments.lpa_sepformer --workdir=runs/enhance --data=folder --data_dir=DIR --noise_dir=DIR2 \\
        --train_split=train-clean-100 --dev_split=dev-clean --test_split=dev-other --teacher_steps=20000

That all 16 intra-chunk layers of a SepFormer can be replaced without collapse is the claim of Y. P. Shkolnikov,
"Learnable Pulse Accumulation", arXiv 2603.16922. Data, sizes and training are ours.
"""

import dataclasses
import datetime
import importlib.metadata
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx
from jax.flatten_util import ravel_pytree

from edgespeech.conversion.enhancement_task import EnhancementDistilConfig, EnhancementTeacher
from edgespeech.conversion.mixers import control_factory, lpa_factory
from edgespeech.conversion.run import Job, Progressive, replacement_order, run_sweep
from edgespeech.data.audio import read_audio
from edgespeech.data.batching import BatchConfig
from edgespeech.data.corpus import Corpus, subset
from edgespeech.data.mixtures import Excerpts, MixtureConfig, MixtureSource
from edgespeech.data.noise import FolderNoise, GeneratedNoise, NoiseSource
from edgespeech.errors import InputError
from edgespeech.evaluation.enhancement import (
    OPTIONAL,
    UtteranceScores,
    enhancer,
    evaluate,
    missing_packages,
    summary,
)
from edgespeech.evaluation.enhancement_plots import enhancement_curve, spectrograms
from edgespeech.evaluation.enhancement_report import write_enhancement_report
from edgespeech.evaluation.plots import sweep_bars
from edgespeech.evaluation.report import device, versions
from edgespeech.models.sepformer import SepFormer, SepFormerConfig
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.ops.sisnr import si_snr_loss
from edgespeech.training.loop import train
from edgespeech.training.state import (
    LossFunction,
    OptimizerConfig,
    init_state,
    make_optimizer,
    make_step,
)
from edgespeech.types import SAMPLE_RATE
from experiments import asr, convert, data_flags, program, run
from experiments.flags import define_config, read_config

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(convert)
PRESETS = {
    "tiny": SepFormerConfig.tiny,
    # Published for 8 kHz; speech here is at 16.
    "wham": lambda: dataclasses.replace(SepFormerConfig.wham(), sample_rate=SAMPLE_RATE),
}
TEST_SECONDS = 10.0  # longer test utterances are cut
HELDOUT_BATCHES = 6  # of the sweep: 36 MB each with the defaults

BATCH = BatchConfig(batch_seconds=8, num_buckets=1)
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, weight_decay=0.0)

# --- data
FLAGS.set_default("synthetic.num_train", 2000)
FLAGS.set_default("synthetic.num_dev", 40)
FLAGS.set_default("synthetic.num_test", 40)
flags.DEFINE_string(
    "noise_dir",
    None,
    "Folder of noise, searched at any depth; every fifth file is for the test alone (default: generated noise).",
)
flags.DEFINE_float(
    "segment_seconds", 2.0, "Utterances are trained on in pieces of at most so many seconds.", 0.1
)
flags.DEFINE_integer(
    "test_utterances", 40, "Test on so many utterances at most, spread over the split.", 1
)
define_config("mixtures", MixtureConfig(), skip=("num_speakers", "seed"))
define_config(
    "batch", BATCH, skip=("max_seconds", "speed_factors", "shuffle", "seed", "batch_multiple")
)

# --- teacher
flags.DEFINE_enum(
    "preset", "tiny", sorted(PRESETS), "Sizes of the model; --model.* change single ones."
)
define_config("model", SepFormerConfig.tiny(), skip=("num_speakers", "sample_rate"))
flags.DEFINE_integer("teacher_steps", 600, "Updates of the teacher.", lower_bound=1)
define_config("optimizer", OPTIMIZER)

# --- conversion
FLAGS.set_default("replaced", ["4", "8", "12", "16"])
FLAGS.set_default("sweep_steps", 40)
define_config("distil", EnhancementDistilConfig(), skip=("kl",))


def experiment() -> None:
    """The whole job, from data to report."""
    # ---------------------------------------------------------------- settings, checked before anything is computed
    model_config = read_config("model", PRESETS[FLAGS.preset]())
    optimizer_config = read_config("optimizer", OPTIMIZER)
    mixtures = dataclasses.replace(read_config("mixtures", MixtureConfig()), seed=FLAGS.seed)
    batches = dataclasses.replace(
        read_config("batch", BATCH), seed=FLAGS.seed, batch_multiple=jax.local_device_count()
    )
    splits = data_flags.test_splits()
    if len(splits) > 1:
        raise InputError(
            f"--test_split={FLAGS.test_split} names {len(splits)} splits: give one, or join them by +"
        )
    num_layers = model_config.num_blocks * model_config.num_intra_layers
    distil_config = read_config("distil", EnhancementDistilConfig())
    recipe = convert.read_recipe(distil_config, num_layers)
    workdir = run.Workdir(FLAGS.workdir, run.flag_settings(), FLAGS.resume)

    # ---------------------------------------------------------------- data
    with workdir.stage("data"):
        train_set, dev_set, tests = data_flags.open_data(splits, require_text=False)
        test_set = spread(Excerpts(tests[splits[0]], TEST_SECONDS), FLAGS.test_utterances)
        noises = open_noise(train_set, dev_set, test_set)
        pieces = [Excerpts(corpus, FLAGS.segment_seconds) for corpus in (train_set, dev_set)]
        whole = dataclasses.replace(batches, batch_seconds=TEST_SECONDS * batches.batch_multiple)
        source, dev_source, test_source = (
            MixtureSource(corpus, noise, mixtures, config)
            for corpus, noise, config in zip(
                (*pieces, test_set), noises, (batches, batches, whole), strict=True
            )
        )
        run.say(asr.describe(train_set, dev_set, {splits[0]: test_set}, source))
    workdir.begin()
    noisy = evaluate(workdir.path, "noisy", None, test_source)
    run.say(f"noisy: {spoken(noisy)}")

    # ---------------------------------------------------------------- teacher
    with workdir.stage("teacher"):
        model = train_teacher(workdir.path, model_config, optimizer_config, source, recipe.loop)
        teacher = EnhancementTeacher(model)
    with workdir.stage("teacher evaluation"):
        teacher_scores = score(
            workdir.path, "teacher", teacher.graphdef, teacher.state, test_source
        )
    run.say(f"teacher: {spoken(teacher_scores)}")

    # ---------------------------------------------------------------- sweep
    job = Job(workdir.path, source, recipe.seed, recipe.loop)
    with workdir.stage("sweep"):
        batches_of_dev = itertools.islice(dev_source.eval_batches(), HELDOUT_BATCHES)
        heldout = [teacher.pairs(batch) for batch in batches_of_dev]
        pulses, errors = run_sweep(
            "lpa", teacher, lpa_factory(recipe.lpa), recipe.sweep_steps, heldout, job
        )
    order, most = replacement_order(errors), recipe.replaced[-1]
    run.say("order of replacement: " + " ".join(str(i + 1) for i in order))

    def row(path: Progressive, count: int, scores, against=None) -> dict[str, Any]:
        layers = sorted(i + 1 for i in order[:count])
        return summary(scores, against) | {
            "replaced": count,
            "layers": layers,
            "parameters": count_parameters(path.hybrid()),
        }

    # ---------------------------------------------------------------- replace, distil, evaluate
    rows: list[dict] = []
    with workdir.stage("conversion lpa"):
        path = Progressive("lpa", teacher, pulses, order[:most], recipe.distil, job)
        for count in recipe.replaced:
            path.advance(count)
            scores = score(workdir.path, f"lpa_{count}", path.graphdef, path.state(), test_source)
            rows.append(row(path, count, scores, teacher_scores))
            run.say(f"{count} of {num_layers} layers replaced: {spoken(scores)}")

    # ---------------------------------------------------------------- controls: same order, same budget
    control_rows: list[dict] = []
    for name in recipe.controls:
        with workdir.stage(f"control {name}"):
            factory = control_factory(name, recipe.window)
            mixers, _ = run_sweep(name, teacher, factory, recipe.sweep_steps, heldout, job)
            path = Progressive(name, teacher, mixers, order[:most], recipe.distil, job)
            path.advance(most)
            scores = score(
                workdir.path, f"control_{name}", path.graphdef, path.state(), test_source
            )
            control_rows.append({"name": name} | row(path, most, scores))
            run.say(f"control {name} in {most} layers: {spoken(scores)}")

    # ---------------------------------------------------------------- report
    absent = missing_packages()
    packages = {
        name: "not installed" if name in absent else importlib.metadata.version(name)
        for name in OPTIONAL.values()
    }
    report = {
        "title": "intra-chunk attention to LPA: scores against the number of replaced layers",
        "command": program.command_line(),
        "date": datetime.date.today().isoformat(),
        "data": {
            "kind": train_set.kind,
            "description": asr.describe_data(train_set.kind),
            "noise": "recorded" if FLAGS.noise_dir else "generated",
            "snr_db": list(mixtures.snr_db),
            "train": asr.split_facts(train_set),
            "dev": asr.split_facts(dev_set),
            "test": asr.split_facts(test_set),
        },
        "missing": absent,
        "noisy": summary(noisy),
        "teacher": summary(teacher_scores)
        | {
            "parameters": count_parameters(teacher.plain),
            "steps": FLAGS.teacher_steps,
            "config": dataclasses.asdict(model_config),
        },
        "sweep": [
            {"layer": i + 1, "mse": e.mse, "relative_mse": e.relative_mse, "variance": e.variance}
            for i, e in enumerate(errors)
        ],
        "order": [i + 1 for i in order],
        "hybrids": rows,
        "controls": control_rows,
        "stages": [{"name": n, "seconds": s} for n, s in workdir.read_json("stages.json").items()],
        "versions": versions() | packages,
        "device": device(),
        "seeds": {"seed": recipe.seed},
        "notes": [n for corpus in (train_set, dev_set, test_set) for n in corpus.notes],
    }
    draw(workdir.path, report, teacher_scores)
    write_enhancement_report(workdir.path, report)
    run.say(f"report: {workdir.path / 'report.md'}")


def spread(corpus: Corpus, count: int) -> Corpus:
    """At most so many utterances, at equal distances in the corpus."""
    rows = np.linspace(0, len(corpus) - 1, min(count, len(corpus))).round().astype(int)
    return subset(corpus, rows.tolist())


def open_noise(train_set: Corpus, dev_set: Corpus, test_set: Corpus) -> list[NoiseSource]:
    """Noise to train, tune and test with; generated babble is of the split's own voices."""
    if FLAGS.noise_dir:
        kept, held_out = FolderNoise(FLAGS.noise_dir).hold_out()
        return [kept, kept, held_out]
    return [GeneratedNoise(corpus) for corpus in (train_set, dev_set, test_set)]


def si_snr_objective(graphdef: nnx.GraphDef) -> LossFunction:
    """The loss of a SepFormer on a `MixtureBatch`: see `si_snr_loss`."""

    def loss(params, batch, key, step):
        del key, step
        model = nnx.merge(graphdef, params, copy=True)
        estimates = model(batch.audio, batch.audio_lengths).estimates
        return si_snr_loss(estimates, batch.targets, batch.audio_lengths, batch.weights), {}

    return loss


def train_teacher(workdir, model_config, optimizer_config, source, loop) -> SepFormer:
    """A teacher with the moving average of its parameters; a resumed run takes up its checkpoint."""
    model = SepFormer(model_config, rngs=nnx.Rngs(FLAGS.seed))
    model.mask_network.scan_layers = True
    graphdef, params = nnx.split(model)
    _, unravel = ravel_pytree(params)
    optimizer = make_optimizer(optimizer_config, FLAGS.teacher_steps, params)
    decay = optimizer_config.average_decay
    state = train(
        "teacher",
        make_step(si_snr_objective(graphdef), unravel, optimizer, decay),
        init_state(params, optimizer),
        source,
        FLAGS.teacher_steps,
        workdir=workdir,
        settings=json.loads(
            json.dumps(
                {
                    "steps": FLAGS.teacher_steps,
                    "model": dataclasses.asdict(model_config),
                    "optimizer": dataclasses.asdict(optimizer_config),
                }
            )
        ),
        seed=FLAGS.seed,
        config=loop,
    )
    return nnx.merge(graphdef, unravel(state.average))


def score(
    workdir: Path, name: str, graphdef: nnx.GraphDef, state: nnx.State, source: MixtureSource
) -> tuple[UtteranceScores, ...]:
    """Scores of a model on the test set; see `evaluate`."""
    run_model = enhancer(graphdef)
    return evaluate(workdir, name, lambda batch: run_model(state, batch), source)


def spoken(scores: tuple[UtteranceScores, ...]) -> str:
    """The means, for the terminal."""
    means = summary(scores)
    return (
        f"SI-SNR {means['si_snr']:.2f} dB ({means['improvement']:+.2f}), PESQ {means['pesq']:.2f}, "
        f"STOI {means['stoi']:.3f}"
    )


def draw(workdir: Path, report: dict, teacher_scores: tuple[UtteranceScores, ...]) -> None:
    """Draws sweep, scores, losses, and the spectrograms of one utterance into `plots/`."""
    plots, note = workdir / "plots", f"{report['data']['kind']} data"
    sweep_bars(plots / "sweep.png", report["sweep"], note)
    enhancement_curve(
        plots / "scores.png",
        report["noisy"],
        report["teacher"],
        report["hybrids"],
        report["controls"],
        note,
    )
    asr.draw_losses(workdir, note)
    # The utterance that the teacher improves by the median.
    ranked = np.argsort([row.improvement for row in teacher_scores], kind="stable")
    name = sorted(path.name for path in (workdir / "audio" / "noisy").iterdir())[
        ranked[len(ranked) // 2]
    ]
    most = report["hybrids"][-1]["replaced"]
    folders = {"noisy": "noisy", "clean": "clean", "teacher": "teacher"}
    folders[f"hybrid, {most} layers replaced"] = f"lpa_{most}"
    signals = {
        title: read_audio(workdir / "audio" / folder / name).samples
        for title, folder in folders.items()
    }
    spectrograms(plots / "spectrograms.png", signals, note)


if __name__ == "__main__":
    program.main(experiment)
