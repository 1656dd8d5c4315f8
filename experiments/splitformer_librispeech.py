"""Early exits on equal terms: the early-exit baseline, Splitformer, wav2vec2; every exit, every rule for leaving.

Command     python -m experiments.splitformer_librispeech --workdir=runs/splitformer
Hardware    2 CPU cores; uses every local device it finds
Time        about 12 minutes after installation with the default, synthetic data
Expect      WORKDIR/report.md: WER of every exit of every model; WER at equal compute for every exit rule, the fixed
            exits and the oracle; how much of the gap between these two each rule closes

With a wav2vec2 encoder of as many exits beside them, --models=ee_baseline,splitformer,wav2vec2 (--exit_heads=own: a
head for every exit).

On a LibriSpeech tree:

    python -m experiments.splitformer_librispeech --workdir=runs/exits --data=folder --data_dir=DIR --preset=paper \\
        --model.front_end=fixed --train_split=train-clean-100 --dev_split=dev-clean \\
        --test_split=test-clean,test-other --bpe_size=256 --batch.batch_seconds=600 --batch.num_buckets=6 --steps=60000

The models: early-exit ASR (arXiv 2309.09546), whose wav2vec2 is pretrained and here is not, and Splitformer (arXiv
2506.18035). Optimiser, schedule, small sizes and the choice of thresholds on dev are ours. All models see the same
batches in the same order, of utterances whose text each of them can spell in its frames. A model is scored with the
moving average of its parameters and the running statistics of the last step; the learning rate ends so low that the two
go together.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path

from absl import flags
from flax import nnx

from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.data.tokenizer import Tokenizer
from edgespeech.errors import InputError
from edgespeech.evaluation.exit_curves import analyse
from edgespeech.evaluation.exit_plots import wer_against_compute, wer_against_layer
from edgespeech.evaluation.exit_report import write_exit_report
from edgespeech.evaluation.exit_scores import (
    ExitDecoder,
    ExitScores,
    load_exit_scores,
    save_exit_scores,
)
from edgespeech.evaluation.wer import paired_bootstrap
from edgespeech.inference.exit_policy import CALIBRATED, ExitPolicy, save_policy
from edgespeech.inference.exit_predictor import ExitPredictor, save_predictor
from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.models.exit_macs import ExitConfig
from edgespeech.models.splitformer import Placement, Splitformer, SplitformerConfig
from edgespeech.models.wav2vec2 import Wav2Vec2Config, count_parameters
from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits, Wav2Vec2ExitsConfig
from edgespeech.training.exits import ExitLossConfig, exit_objective
from edgespeech.training.state import OptimizerConfig
from experiments import asr, data_flags, distributed_flags, program, run, tokenizer_flags
from experiments.facts import run_facts
from experiments.fit import fit
from experiments.flags import define_config, read_config

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(data_flags)
flags.adopt_module_key_flags(tokenizer_flags)
BRANCHES: dict[str, Placement] = {
    "ee_baseline": "none",
    "splitformer": "first_last",
    "all_exits": "all",
}
MODELS = (*BRANCHES, "wav2vec2")
PRESETS = {"tiny": SplitformerConfig.tiny, "paper": SplitformerConfig.splitformer}
# The tiny one has the width, the frame rate and about the parameters of the tiny Conformers.
ENCODERS = {
    "tiny": dataclasses.replace(
        Wav2Vec2Config.tiny(),
        width=96,
        ffn_width=384,
        front_channels=96,
        conv_strides=2,
        conv_blocks=4,
        position_groups=96,
    ),
    "paper": Wav2Vec2Config.base(),
}

BATCH = BatchConfig(batch_seconds=30, num_buckets=2, speed_factors=(0.9, 1.0, 1.1))
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, average_decay=0.99)

# --- models and training
flags.DEFINE_list(
    "models",
    ["ee_baseline", "splitformer"],
    f"Models to train, parted by commas, the first one to compare with: {', '.join(MODELS)} (Conformers with branches "
    "at no exit, at the first and the last, at all; an encoder of --model.num_exits equal groups of layers).",
)
flags.DEFINE_enum(
    "preset",
    "tiny",
    sorted(PRESETS),
    "Sizes of the models; --model.* change single ones of the Conformers, --wav2vec2.* of the wav2vec2.",
)
define_config("model", SplitformerConfig.tiny(), skip=("vocab_size", "branches"))
define_config("wav2vec2", ENCODERS["tiny"], skip=("vocab_size", "padding"))
flags.DEFINE_enum(
    "exit_heads",
    "shared",
    ["shared", "own"],
    "Heads of the model wav2vec2: one for all exits, or one for each (the Conformers' are always their own).",
)
define_config("batch", BATCH, skip=("shuffle", "seed", "batch_multiple"))
flags.DEFINE_integer("steps", 1800, "Updates of every model.", lower_bound=1)
define_config("loss", ExitLossConfig())
define_config("optimizer", OPTIMIZER)
flags.DEFINE_integer("save_every", 200, "Updates between checkpoints.", lower_bound=1)

# --- exit rules
flags.DEFINE_integer(
    "n_best", 8, "Label sequences among which the rule posterior compares.", lower_bound=1
)
flags.DEFINE_float(
    "predictor_penalty",
    1.0,
    "Squared penalty on the weights of the rule calibrated, for standardised features.",
    lower_bound=1e-6,
)


def experiment() -> None:
    """The whole job, from data to report."""
    # ---------------------------------------------------------------- settings, checked before anything is computed
    names = chosen_models()
    model_config = read_config("model", PRESETS[FLAGS.preset]())
    if model_config.num_exits < 2:
        raise InputError("--model.num_exits=1 leaves nothing to choose: give at least 2")
    loss_config = read_config("loss", ExitLossConfig())
    if len(loss_config.weights) not in (0, model_config.num_exits):
        raise InputError(
            f"--loss.weights holds {len(loss_config.weights)} numbers: give {model_config.num_exits}, one an exit"
        )
    encoder_config = read_config("wav2vec2", ENCODERS[FLAGS.preset])
    choose_configs(names, model_config, encoder_config)
    optimizer_config = read_config("optimizer", OPTIMIZER)
    batch_config = dataclasses.replace(
        read_config("batch", BATCH), seed=FLAGS.seed, batch_multiple=run.batch_multiple()
    )
    splits = data_flags.test_splits()
    workdir = run.Workdir(FLAGS.workdir, run.flag_settings(), FLAGS.resume)

    # ---------------------------------------------------------------- data
    with workdir.stage("data"):
        train_set, dev_set, test_sets = data_flags.open_data(splits)
        tokenizer = tokenizer_flags.make_tokenizer(train_set)
        model_config = dataclasses.replace(model_config, vocab_size=tokenizer.vocab_size)
        encoder_config = dataclasses.replace(encoder_config, vocab_size=tokenizer.vocab_size)
        configs = choose_configs(names, model_config, encoder_config)
        source = BatchSource(
            train_set,
            tokenizer,
            batch_config,
            lambda samples: min(config.num_frames(samples) for config in configs.values()),
        )
        whole = data_flags.whole_batches(batch_config)
        dev_source = BatchSource(dev_set, None, whole)
        test_sources = {s: BatchSource(corpus, None, whole) for s, corpus in test_sets.items()}
        run.say(asr.describe(train_set, dev_set, test_sets, source))
    workdir.begin()

    # ---------------------------------------------------------------- every model: train, evaluate, choose thresholds
    models, results = [], []
    for name, config in configs.items():
        folder = workdir.path / name
        if not (folder / "model.json").exists():
            with workdir.stage(f"{name} training"):
                model = train_model(
                    workdir.path, name, config, loss_config, optimizer_config, source
                )
                facts = {"data": train_set.kind, "steps": FLAGS.steps, "model": name}
                save_pretrained(folder, model, tokenizer, facts)
        model, tokenizer, _ = load_pretrained(folder)
        assert isinstance(model, Splitformer | Wav2Vec2Exits)
        assert isinstance(tokenizer, Tokenizer)
        graphdef, state = nnx.split(model)
        with workdir.stage(f"{name} evaluation"):
            decoder = ExitDecoder(graphdef, tokenizer, FLAGS.n_best)
            listen = functools.partial(decoder.score, state)
            dev = evaluate(workdir.path, f"{name}_dev", listen, dev_source)
            tests = {
                split: evaluate(workdir.path, file_name(f"{name}_test_{split}"), listen, test)
                for split, test in test_sources.items()
            }
            curves, predictor = analyse(config, dev, tests[splits[0]], FLAGS.predictor_penalty)
            save_predictor(folder, predictor)
            save_best_policy(folder, curves, predictor)
        for m, row in enumerate(curves["exits"]):
            rates = asr.rates({split: test.results[m] for split, test in tests.items()})
            row |= {key: rates[key] for key in ("ci", "cer", "splits") if key in rates}
            run.say(
                f"{name}, exit {m + 1}: {asr.spoken({s: t.results[m] for s, t in tests.items()})}"
            )
        results.append(tests[splits[0]].results)
        models.append(
            {
                "name": name,
                "structure": structure(config),
                "parameters": count_parameters(model),
                "steps": FLAGS.steps,
                "config": dataclasses.asdict(config),
                **curves,
            }
        )

    # ---------------------------------------------------------------- report
    corpora = (train_set, dev_set, *test_sets.values())
    facts = run_facts(workdir, FLAGS.seed)
    report = facts | {
        "title": "early exits and parallel branches",
        "data": asr.data_facts(
            train_set, dev_set, test_sets, source, [dev_source, *test_sources.values()]
        ),
        "models": models,
        "differences": [
            {"model": name, "exit": exit, "difference": paired.difference, "ci": list(paired.ci)}
            for name, exits in zip(names[1:], results[1:], strict=True)
            for exit, paired in enumerate(map(paired_bootstrap, results[0], exits), 1)
        ],
        "notes": [note for corpus in corpora for note in corpus.notes],
    }
    note = f"{train_set.kind} data"
    wer_against_layer(workdir.path / "plots" / "wer_layer.png", models, note)
    for model in models:
        wer_against_compute(
            workdir.path / "plots" / f"wer_compute_{model['name']}.png", model, note
        )
    asr.draw_losses(workdir.path, note)
    write_exit_report(workdir.path, report)
    run.say(f"report: {workdir.path / 'report.md'}")


def chosen_models() -> list[str]:
    """The names in --models.

    Raises:
        InputError: there is none, one is not known, or one comes twice.
    """
    names = list(FLAGS.models)
    for name in names:
        if name not in MODELS or names.count(name) > 1:
            raise InputError(f"--models holds {name!r}: choose from {', '.join(MODELS)}, each once")
    if not names:
        raise InputError(f"--models is empty: choose from {', '.join(MODELS)}")
    return names


def choose_configs(
    names: list[str], model_config: SplitformerConfig, encoder_config: Wav2Vec2Config
) -> dict[str, ExitConfig]:
    """The configuration of every model in --models, all with as many exits.

    Raises:
        InputError: the layers of the wav2vec2 cannot be parted into so many groups.
    """
    configs: dict[str, ExitConfig] = {}
    for name in names:
        if name in BRANCHES:
            configs[name] = dataclasses.replace(model_config, branches=BRANCHES[name])
        else:
            own_heads = FLAGS.exit_heads == "own"
            configs[name] = Wav2Vec2ExitsConfig.evenly(
                encoder_config, model_config.num_exits, own_heads
            )
    return configs


def structure(config: ExitConfig) -> str:
    """A few words for the report."""
    if isinstance(config, SplitformerConfig):
        return f"Conformer layers, branches: {config.branches}"
    return f"wav2vec2 layers, heads: {'own' if config.own_heads else 'shared'}"


def train_model(
    workdir: Path,
    name: str,
    config: ExitConfig,
    loss_config: ExitLossConfig,
    optimizer_config: OptimizerConfig,
    source: BatchSource,
) -> Splitformer | Wav2Vec2Exits:
    """A model with the moving average of its parameters; seed, order of the data and steps are the same for all."""
    rngs = nnx.Rngs(FLAGS.seed)
    if isinstance(config, SplitformerConfig):
        model = Splitformer(config, rngs=rngs)
    else:
        model = Wav2Vec2Exits.create(config, rngs=rngs)
    graphdef, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    average, statistics = fit(
        name,
        exit_objective(graphdef, loss_config),
        params,
        source,
        FLAGS.steps,
        workdir=workdir,
        settings={"model": dataclasses.asdict(config), "loss": dataclasses.asdict(loss_config)},
        optimizer=optimizer_config,
        seed=FLAGS.seed,
        loop=distributed_flags.loop_config(),
        extra=statistics,
    )
    return nnx.merge(graphdef, average, statistics)


def evaluate(
    workdir: Path, name: str, listen: Callable[[BatchSource], ExitScores], source: BatchSource
) -> ExitScores:
    """Scores of every exit; they stay in `exits/NAME.npz` and `hypotheses/NAME_exitM.jsonl` for a resumed run."""
    if load_exit_scores(workdir, name) is None:
        save_exit_scores(workdir, name, listen(source))
    found = load_exit_scores(workdir, name)
    assert found is not None
    return found


def file_name(name: str) -> str:
    """The name with nothing in it that a file name may lack."""
    return re.sub(r"[^\w.+-]", "_", name)


def save_best_policy(folder: Path, curves: dict, predictor: ExitPredictor) -> None:
    """Saves the rule that has the lowest WER on dev within the compute of the best fixed exit, less to its compute."""
    budget = curves["exits"][curves["best_fixed"] - 1]["dev_cost"]
    rows = [
        (row["dev_wer"], row["dev_cost"], rule, row["threshold"])
        for rule, row in itertools.chain.from_iterable(
            ((rule, row) for row in curve) for rule, curve in curves["curves"].items()
        )
        if row["budget"] == budget
    ]
    wer, cost, rule, threshold = min(rows)
    about = {"dev_wer": wer, "dev_cost": cost, "budget": budget}
    used = predictor if rule == CALIBRATED else None
    save_policy(folder, ExitPolicy(rule, float(threshold), FLAGS.n_best, used), about)


if __name__ == "__main__":
    program.main(experiment)
