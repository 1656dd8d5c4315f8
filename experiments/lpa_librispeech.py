"""Convert a speech model from attention to Learnable Pulse Accumulation and report what it costs in WER.

Command     python -m experiments.lpa_librispeech --workdir=runs/lpa
Hardware    2 CPU cores; uses every local device it finds
Time        about 15 minutes after installation with the default, synthetic data
Expect      WORKDIR/report.md: a teacher below 5% WER on the synthetic test set, and WER against the number of layers
            whose attention was replaced (0, 2, 4, 6, 8 of 12), beside three controls at 8; see docs/results/

On a LibriSpeech tree:

    python -m experiments.lpa_librispeech --workdir=runs/real --data=folder --data_dir=DIR --preset=small \\
        --train_split=train-clean-100 --dev_split=dev-other --test_split=dev-clean --bpe_size=256

After Y. P. Shkolnikov, "Learnable Pulse Accumulation", arXiv 2603.16922; docstrings say what is the paper's and what
is our reading.
"""

import dataclasses
import datetime
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from flax import nnx
from jax.flatten_util import ravel_pytree

from edgespeech.conversion.distil import DistilConfig
from edgespeech.conversion.mixers import CONTROLS, DEFAULT_CONTROLS, control_factory, lpa_factory
from edgespeech.conversion.run import Job, Progressive, Teacher, replacement_order, run_sweep
from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.data.corpus import Corpus, join
from edgespeech.data.sources import KINDS, open_corpus
from edgespeech.data.synthetic import SyntheticConfig
from edgespeech.data.tokenizer import CharTokenizer, SentencePieceTokenizer, Tokenizer
from edgespeech.errors import InputError
from edgespeech.evaluation.decode import GreedyDecoder
from edgespeech.evaluation.report import device, versions, write_report
from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config, count_parameters
from edgespeech.nn.lpa import LPAConfig
from edgespeech.training.ctc import ctc_objective
from edgespeech.training.loop import LoopConfig, train
from edgespeech.training.state import OptimizerConfig, init_state, make_optimizer, make_step
from experiments import asr, program, run
from experiments.flags import define_config, int_list, read_config

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(run)
PRESETS = {
    "tiny": Wav2Vec2Config.tiny,
    "small": Wav2Vec2Config.small,
    "wav2vec2_base": Wav2Vec2Config.base,
}

BATCH = BatchConfig(batch_seconds=30, num_buckets=2, speed_factors=(0.9, 1.0, 1.1))
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, average_decay=0.995)

# --- data
flags.DEFINE_enum(
    "data",
    "synthetic",
    KINDS,
    "synthetic: espeak-ng voices, made here; folder: LibriSpeech trees; tfds: prepared shards.",
)
flags.DEFINE_list(
    "data_dir",
    [],
    "Folders of --data=folder or tfds; DIR, or DIR:SPLIT+SPLIT for splits of its own.",
)
flags.DEFINE_list(
    "more_train", [], "Further folders to train on, each DIR:SPLIT+SPLIT (--data=folder or tfds)."
)
flags.DEFINE_string("train_split", "train", "Split to train on; several joined by +.")
flags.DEFINE_string(
    "dev_split", "dev", "Split on which the sweep measures its errors; several joined by +."
)
flags.DEFINE_string("test_split", "test", "Split that the WER is reported on; several joined by +.")
flags.DEFINE_enum("tokenizer", "bpe", ["char", "bpe"], "Units of the CTC head.")
flags.DEFINE_integer(
    "bpe_size", 400, "Units of --tokenizer=bpe, learned from the training text.", lower_bound=32
)
define_config(
    "batch",
    BATCH,
    skip=("shuffle", "seed", "batch_multiple"),
)
define_config("synthetic", SyntheticConfig(), skip=("seed",))

# --- teacher
flags.DEFINE_enum(
    "preset", "tiny", sorted(PRESETS), "Sizes of the model; --model.* change single ones."
)
define_config("model", Wav2Vec2Config.tiny(), skip=("vocab_size",))
flags.DEFINE_string(
    "teacher",
    None,
    "Folder of a saved teacher (such as WORKDIR/teacher of another run): nothing is trained.",
)
flags.DEFINE_integer("teacher_steps", 3600, "Updates of the teacher.", lower_bound=1)
flags.DEFINE_list(
    "intermediate_ctc",
    ["4", "8"],
    "Layers, from 1, whose output also gets a CTC loss in the teacher's training.",
)
define_config("optimizer", OPTIMIZER)

# --- conversion
define_config("lpa", LPAConfig())
define_config("distil", DistilConfig())
flags.DEFINE_integer(
    "sweep_steps", 150, "Updates of every layer's replacement in the sweep.", lower_bound=1
)
flags.DEFINE_list("replaced", ["2", "4", "6", "8"], "Numbers of replaced layers to report.")
flags.DEFINE_list(
    "controls",
    list(DEFAULT_CONTROLS),
    f"Controls at the largest number of --replaced: 'all', 'none', or some of {', '.join(CONTROLS)}.",
)
flags.DEFINE_integer(
    "window", 8, "Frames to each side that the sliding_window control sees.", lower_bound=1
)
flags.DEFINE_integer("save_every", 200, "Updates between checkpoints.", lower_bound=1)


def experiment() -> None:
    """The whole job, from data to report."""
    # ---------------------------------------------------------------- settings, checked before anything is computed
    model_config = read_config("model", PRESETS[FLAGS.preset]())
    optimizer_config = read_config("optimizer", OPTIMIZER)
    lpa_config = read_config("lpa", LPAConfig())
    distil_config = read_config("distil", DistilConfig())
    batch_config = dataclasses.replace(
        read_config("batch", BATCH),
        seed=FLAGS.seed,
        batch_multiple=jax.local_device_count(),
    )
    controls = chosen_controls()
    if FLAGS.teacher:
        teacher_model, tokenizer, _ = load_pretrained(Path(FLAGS.teacher))
        model_config = teacher_model.config
    else:
        intermediate = int_list("intermediate_ctc", 1, model_config.num_layers)
    replaced = int_list("replaced", 1, model_config.num_layers)
    if not replaced:
        raise InputError("--replaced is empty: give at least one number of layers")
    workdir = run.Workdir(FLAGS.workdir, run.flag_settings(), FLAGS.resume)
    loop = LoopConfig(save_every=FLAGS.save_every, quiet=FLAGS.quiet)

    # ---------------------------------------------------------------- data
    with workdir.stage("data"):
        train_set, dev_set, test_set = open_data()
        if not FLAGS.teacher:
            tokenizer = make_tokenizer(train_set)
            model_config = dataclasses.replace(model_config, vocab_size=tokenizer.vocab_size)
        source = BatchSource(train_set, tokenizer, batch_config, model_config.num_frames)
        whole = dataclasses.replace(
            batch_config,
            max_seconds=60,
            speed_factors=(1.0,),
            batch_seconds=batch_config.batch_seconds * 2,
        )
        dev_source = BatchSource(dev_set, tokenizer, whole, model_config.num_frames)
        test_source = BatchSource(test_set, None, whole)
        say(asr.describe(train_set, dev_set, test_set, source))
    workdir.begin()
    kind = train_set.kind

    # ---------------------------------------------------------------- teacher
    folder = Path(FLAGS.teacher) if FLAGS.teacher else workdir.path / "teacher"
    if not (folder / "model.json").exists():
        with workdir.stage("teacher"):
            teacher_model = train_teacher(
                workdir.path, model_config, optimizer_config, intermediate, source, loop
            )
            save_pretrained(
                folder, teacher_model, tokenizer, {"data": kind, "steps": FLAGS.teacher_steps}
            )
    teacher_model, tokenizer, about = load_pretrained(folder)
    graphdef, state = nnx.split(teacher_model)
    with workdir.stage("teacher evaluation"):
        teacher_result = asr.evaluate(
            workdir.path, "teacher", GreedyDecoder(graphdef, tokenizer), state, test_source
        )
    say(f"teacher: WER {teacher_result.wer:.2%}")

    # ---------------------------------------------------------------- sweep
    teacher = Teacher(teacher_model)
    job = Job(workdir.path, source, FLAGS.seed, loop)
    with workdir.stage("sweep"):
        heldout = [teacher.pairs(b) for b in itertools.islice(dev_source.eval_batches(), 12)]
        pulses, errors = run_sweep(
            "lpa", teacher, lpa_factory(lpa_config), FLAGS.sweep_steps, heldout, job
        )
    order = replacement_order(errors)
    say("order of replacement: " + " ".join(str(i + 1) for i in order))

    # ---------------------------------------------------------------- replace, distil, evaluate
    rows: list[dict] = []
    with workdir.stage("conversion lpa"):
        path = Progressive("lpa", teacher, pulses, order[: replaced[-1]], distil_config, job)
        decoder = GreedyDecoder(path.graphdef, tokenizer)
        for count in replaced:
            path.advance(count)
            result = asr.evaluate(workdir.path, f"lpa_{count}", decoder, path.state(), test_source)
            hybrid = path.hybrid()
            hybrid_folder = workdir.path / f"hybrid_{count}"
            # A resumed run has the weights of its newest step, which are not those of an earlier count.
            if not (hybrid_folder / "model.json").exists():
                layers = [i + 1 for i in order[:count]]
                save_pretrained(
                    hybrid_folder,
                    hybrid,
                    tokenizer,
                    {"data": kind, "replaced": layers, "test_wer": result.wer},
                )
            rows.append(
                asr.table_row(result, count, order, hybrid)
                | {"delta_vs_teacher": asr.difference(teacher_result, result)}
            )
            say(f"{count} of {len(order)} layers replaced: WER {result.wer:.2%}")

    # ---------------------------------------------------------------- controls: same order, same budget
    control_rows: list[dict] = []
    for name in controls:
        with workdir.stage(f"control {name}"):
            factory = control_factory(name, FLAGS.window)
            mixers, _ = run_sweep(name, teacher, factory, FLAGS.sweep_steps, heldout, job)
            path = Progressive(name, teacher, mixers, order[: replaced[-1]], distil_config, job)
            path.advance(replaced[-1])
            decoder = GreedyDecoder(path.graphdef, tokenizer)
            result = asr.evaluate(
                workdir.path, f"control_{name}", decoder, path.state(), test_source
            )
            control_rows.append(
                {"name": name} | asr.table_row(result, replaced[-1], order, path.hybrid())
            )
            say(f"control {name} in {replaced[-1]} layers: WER {result.wer:.2%}")

    # ---------------------------------------------------------------- report
    report = {
        "title": "Attention to LPA: WER against the number of replaced layers",
        "command": program.command_line(),
        "date": datetime.date.today().isoformat(),
        "data": {
            "kind": kind,
            "description": asr.describe_data(kind),
            "train": asr.split_facts(train_set),
            "dev": asr.split_facts(dev_set),
            "test": asr.split_facts(test_set),
            "skipped": asr.skipped_counts(
                [train_set, dev_set, test_set], [source, dev_source, test_source]
            ),
            "padding_waste": source.padding_waste,
        },
        "teacher": asr.rates(teacher_result)
        | {
            "parameters": count_parameters(teacher_model),
            "steps": about.get("steps", 0),
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
        "versions": versions(),
        "device": device(),
        "seeds": {"seed": FLAGS.seed},
        "notes": [note for corpus in (train_set, dev_set, test_set) for note in corpus.notes],
    }
    asr.draw(workdir.path, report, hybrid, test_source)
    write_report(workdir.path, report)
    say(f"report: {workdir.path / 'report.md'}")


def say(text: str) -> None:
    """Prints unless --quiet."""
    if not FLAGS.quiet:
        print(text, flush=True)


def chosen_controls() -> list[str]:
    """The names in --controls.

    Raises:
        InputError: a name is not known.
    """
    names = list(FLAGS.controls)
    if names == ["all"]:
        return list(CONTROLS)
    if names in ([], ["none"]):
        return []
    for name in names:
        if name not in CONTROLS:
            raise InputError(
                f"--controls holds {name!r}: choose 'all', 'none', or from {', '.join(CONTROLS)}"
            )
    return names


def open_data() -> tuple[Corpus, Corpus, Corpus]:
    """Train, dev and test."""
    synthetic = dataclasses.replace(read_config("synthetic", SyntheticConfig()), seed=FLAGS.seed)

    def corpus(split: str, data_dir: Sequence[str]) -> Corpus:
        return open_corpus(
            FLAGS.data, split, data_dir=data_dir, synthetic=synthetic, cache_dir=FLAGS.cache_dir
        )

    train_set = corpus(FLAGS.train_split, FLAGS.data_dir)
    if FLAGS.more_train:
        train_set = join(
            [train_set, *(corpus(FLAGS.train_split, [entry]) for entry in FLAGS.more_train)]
        )
    return (
        train_set,
        corpus(FLAGS.dev_split, FLAGS.data_dir),
        corpus(FLAGS.test_split, FLAGS.data_dir),
    )


def make_tokenizer(train_set: Corpus) -> Tokenizer:
    """Characters, or word pieces learned from the training text."""
    if FLAGS.tokenizer == "char":
        return CharTokenizer()
    return SentencePieceTokenizer.train([u.text for u in train_set.utterances], FLAGS.bpe_size)


def train_teacher(workdir, model_config, optimizer_config, intermediate, source, loop) -> Wav2Vec2:
    """A teacher with the moving average of its parameters."""
    model = Wav2Vec2(model_config, rngs=nnx.Rngs(FLAGS.seed))
    model.scan_layers = True
    graphdef, params = nnx.split(model)
    _, unravel = ravel_pytree(params)
    optimizer = make_optimizer(optimizer_config, FLAGS.teacher_steps, params)
    state = train(
        "teacher",
        make_step(
            ctc_objective(graphdef, intermediate),
            unravel,
            optimizer,
            optimizer_config.average_decay,
        ),
        init_state(params, optimizer),
        source,
        FLAGS.teacher_steps,
        workdir=workdir,
        settings={
            "steps": FLAGS.teacher_steps,
            "model": json.loads(json.dumps(dataclasses.asdict(model_config))),
            "optimizer": dataclasses.asdict(optimizer_config),
        },
        seed=FLAGS.seed,
        config=loop,
    )
    return nnx.merge(graphdef, unravel(state.average))


if __name__ == "__main__":
    program.main(experiment)
