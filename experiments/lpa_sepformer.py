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
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from flax import nnx

from edgespeech.conversion.enhancement_task import (
    EnhancementDistilConfig,
    EnhancementTeacher,
    unseal_inter_chunk_layers,
)
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
from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.models.sepformer import SepFormer, SepFormerConfig
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.training.enhancement import si_snr_objective
from edgespeech.training.state import OptimizerConfig
from edgespeech.types import SAMPLE_RATE
from experiments import asr, data_flags, program, recipe, run
from experiments.facts import run_facts
from experiments.fit import fit
from experiments.flags import define_config, read_config
from experiments.recipe import read_recipe
from experiments.replacement import Measure, keep_hybrid, replace_layers

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(data_flags)
flags.adopt_module_key_flags(recipe)
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
flags.DEFINE_string(
    "teacher", None, "A teacher that is trained already, such as WORKDIR/teacher of another run."
)
flags.DEFINE_integer("teacher_steps", 1200, "Updates of the teacher.", lower_bound=1)
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
        read_config("batch", BATCH), seed=FLAGS.seed, batch_multiple=run.batch_multiple()
    )
    splits = data_flags.test_splits()
    if len(splits) > 1:
        raise InputError(
            f"--test_split={FLAGS.test_split} names {len(splits)} splits: give one, or join them by +"
        )
    teacher_model = open_teacher(FLAGS.teacher) if FLAGS.teacher else None
    if teacher_model is not None:
        model_config = teacher_model.config
    num_layers = model_config.num_blocks * model_config.num_intra_layers
    how = read_recipe(read_config("distil", EnhancementDistilConfig()), num_layers)
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
    if teacher_model is None:
        folder = workdir.path / "teacher"
        if not (folder / "model.json").exists():
            with workdir.stage("teacher"):
                teacher_model = train_teacher(
                    workdir.path, model_config, optimizer_config, source, how.loop
                )
                facts = {"data": train_set.kind, "steps": FLAGS.teacher_steps}
                save_pretrained(folder, teacher_model, None, facts)
        teacher_model = open_teacher(folder)
    teacher = EnhancementTeacher(teacher_model)
    bench = EnhancementBench(workdir, test_source, train_set.kind)
    with workdir.stage("teacher evaluation"):
        teacher_scores = bench.measure(teacher.graphdef)("teacher", teacher.state)
    bench.teacher = teacher_scores
    run.say(f"teacher: {spoken(teacher_scores)}")

    # ---------------------------------------------------------------- sweep, replacement, controls
    done = replace_layers(workdir, teacher, source, dev_source, HELDOUT_BATCHES, bench, how)

    # ---------------------------------------------------------------- report
    absent = missing_packages()
    packages = {
        name: "not installed" if name in absent else importlib.metadata.version(name)
        for name in OPTIONAL.values()
    }
    facts = run_facts(workdir, how.seed)
    facts["versions"] |= packages
    report = facts | {
        "title": "intra-chunk attention to LPA: scores against the number of replaced layers",
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
            "steps": 0 if FLAGS.teacher else FLAGS.teacher_steps,
            "config": dataclasses.asdict(model_config),
        },
        "sweep": done.sweep,
        "order": [i + 1 for i in done.order],
        "hybrids": done.hybrids,
        "controls": done.controls,
        "notes": [n for corpus in (train_set, dev_set, test_set) for n in corpus.notes],
    }
    draw(workdir.path, report, teacher_scores)
    write_enhancement_report(workdir.path, report)
    run.say(f"report: {workdir.path / 'report.md'}")


@dataclasses.dataclass
class EnhancementBench:
    """The `Bench` of enhancement: scores on the test mixtures.

    Attributes:
        workdir: of the run; audio, scores and hybrids stay in it.
        source: the test mixtures.
        kind: of the training data.
        teacher: its scores, which every row is compared with.
    """

    workdir: run.Workdir
    source: MixtureSource
    kind: str
    teacher: Sequence[UtteranceScores] | None = None

    def measure(self, graphdef: nnx.GraphDef) -> Measure:
        """See `Bench`; results are the scores of every utterance."""
        enhance = enhancer(graphdef)
        return lambda name, state: evaluate(
            self.workdir.path, name, lambda batch: enhance(state, batch), self.source
        )

    def row(
        self, results: Sequence[UtteranceScores], count: int, order: tuple[int, ...], model: Any
    ) -> dict[str, Any]:
        """See `Bench`."""
        return summary(results, self.teacher) | {
            "replaced": count,
            "layers": sorted(i + 1 for i in order[:count]),
            "parameters": count_parameters(unseal_inter_chunk_layers(model)),
        }

    def spoken(self, results: Sequence[UtteranceScores]) -> str:
        """See `Bench`."""
        return spoken(results)

    def keep(
        self, model: Any, count: int, order: tuple[int, ...], results: Sequence[UtteranceScores]
    ) -> None:
        """See `Bench`."""
        layers, improvement = [i + 1 for i in order[:count]], summary(results)["improvement"]
        facts = {"data": self.kind, "replaced": layers, "test_improvement_db": improvement}
        keep_hybrid(self.workdir, unseal_inter_chunk_layers(model), count, None, facts)


def open_teacher(folder: str | Path) -> SepFormer:
    """A saved SepFormer for one voice at 16 kHz.

    Raises:
        InputError: there is none.
    """
    model, _, _ = load_pretrained(Path(folder))
    if not isinstance(model, SepFormer):
        raise InputError(f"{folder} is a {type(model).__name__}: name a saved SepFormer")
    config = model.config
    if (config.num_speakers, config.sample_rate) != (1, SAMPLE_RATE):
        raise InputError(
            f"{folder} is for {config.num_speakers} voices at {config.sample_rate} Hz: enhancement here needs one for "
            f"1 voice at {SAMPLE_RATE} Hz"
        )
    model.mask_network.scan_layers = True
    return model


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


def train_teacher(workdir, model_config, optimizer_config, source, loop) -> SepFormer:
    """A teacher with the moving average of its parameters; a resumed run takes up its checkpoint."""
    model = SepFormer(model_config, rngs=nnx.Rngs(FLAGS.seed))
    model.mask_network.scan_layers = True
    graphdef, params = nnx.split(model)
    average, _ = fit(
        "teacher",
        si_snr_objective(graphdef),
        params,
        source,
        FLAGS.teacher_steps,
        workdir=workdir,
        settings={"model": dataclasses.asdict(model_config)},
        optimizer=optimizer_config,
        seed=FLAGS.seed,
        loop=loop,
    )
    return nnx.merge(graphdef, average)


def spoken(scores: Sequence[UtteranceScores]) -> str:
    """The means, for the terminal."""
    means = summary(scores)
    return (
        f"SI-SNR {means['si_snr']:.2f} dB ({means['improvement']:+.2f}), PESQ {means['pesq']:.2f}, "
        f"STOI {means['stoi']:.3f}"
    )


def draw(workdir: Path, report: dict, teacher_scores: Sequence[UtteranceScores]) -> None:
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
