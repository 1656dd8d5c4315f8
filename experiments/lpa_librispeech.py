"""Convert a speech model from attention to Learnable Pulse Accumulation and report what it costs in WER.

Command     python -m experiments.lpa_librispeech --workdir=runs/lpa
Hardware    2 CPU cores; uses every local device it finds
Time        about 13 minutes after installation with the default, synthetic data
Expect      WORKDIR/report.md: a teacher below 5% WER on the synthetic test set, and WER against the number of layers
            whose attention was replaced (0, 2, 4, 6, 8 of 12), beside three controls at 8; see docs/results/

On a LibriSpeech tree:

    python -m experiments.lpa_librispeech --workdir=runs/real --data=folder --data_dir=DIR --preset=small \\
        --train_split=train-clean-100 --dev_split=dev-other --test_split=dev-clean --bpe_size=256

The paper's experiment, 8 of 12 layers of wav2vec2-base, with the published weights (needs an accelerator, or patience):

    python -m experiments.lpa_librispeech --workdir=runs/base --data=folder --data_dir=DIR --preset=wav2vec2_base \\
        --teacher=facebook/wav2vec2-base-960h --train_split=train-clean-100 --dev_split=dev-clean \\
        --test_split=test-clean,test-other --replaced=8

A teacher that knows real speech without a hub, and is trained in an hour on two CPU cores: a CTC head on the encoder of
Moonshine, whose weights come with the extra `moonshine` (ours; the paper has nothing of it):

    python -m experiments.lpa_librispeech --workdir=runs/moonshine_ctc --data=folder --data_dir=DIR \\
        --train_split=train-clean-100 --dev_split=dev-other --test_split=dev-clean --preset=moonshine_base \\
        --init=wheel --tokenizer=char --batch.batch_seconds=20 --optimizer.learning_rate=1e-4 --teacher_steps=2000

After Y. P. Shkolnikov, "Learnable Pulse Accumulation", arXiv 2603.16922; docstrings say what is the paper's and what
is our reading.
"""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags
from flax import nnx

from edgespeech.conversion.ctc_task import CTCDistilConfig, CTCTask
from edgespeech.conversion.run import Teacher
from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.data.tokenizer import Tokenizer
from edgespeech.errors import InputError
from edgespeech.evaluation.decode import GreedyDecoder
from edgespeech.interop.ctc_model import PlainCTC
from edgespeech.interop.open_model import open_model
from edgespeech.interop.pretrained import save_pretrained
from edgespeech.interop.tensors import copy_but_head
from edgespeech.models.moonshine import Moonshine
from edgespeech.models.moonshine_ctc import MoonshineCTC, MoonshineCTCConfig, encoder_of
from edgespeech.models.wav2vec2 import Padding, Wav2Vec2, Wav2Vec2Config
from edgespeech.training.ctc import ctc_objective, head_objective
from edgespeech.training.state import OptimizerConfig, checkpoint_settings
from experiments import asr, convert, data_flags, program, run, tokenizer_flags
from experiments.fit import fit
from experiments.flags import define_config, int_list, read_config
from experiments.recipe import read_recipe

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(convert)
flags.adopt_module_key_flags(tokenizer_flags)
PRESETS = {
    "tiny": Wav2Vec2Config.tiny,
    "small": Wav2Vec2Config.small,
    "wav2vec2_base": Wav2Vec2Config.base,
    "moonshine_base": MoonshineCTCConfig.base,
    "moonshine_tiny": MoonshineCTCConfig.tiny,
}
Config = Wav2Vec2Config | MoonshineCTCConfig
MODELS = {Wav2Vec2Config: Wav2Vec2, MoonshineCTCConfig: MoonshineCTC}

BATCH = BatchConfig(batch_seconds=30, num_buckets=2, speed_factors=(0.9, 1.0, 1.1))
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, average_decay=0.995)
HEAD_RATE = 3e-3  # peak of the learning rate of the head alone

# --- data
define_config(
    "batch",
    BATCH,
    skip=("shuffle", "seed", "batch_multiple"),
)

# --- teacher
flags.DEFINE_enum(
    "preset", "tiny", sorted(PRESETS), "Sizes of the model; --model.* change single ones."
)
define_config("model", Wav2Vec2Config.tiny(), skip=("vocab_size",))
SHARED_FIELDS = tuple(field.name for field in dataclasses.fields(Wav2Vec2Config))
define_config("model", MoonshineCTCConfig.base(), skip=SHARED_FIELDS)  # sizes that only it has
flags.DEFINE_string(
    "teacher",
    None,
    "A teacher that is trained already: a saved one (such as WORKDIR/teacher of another run), or a wav2vec2 "
    "checkpoint of Hugging Face, its folder or its hub id. Sizes and tokenizer are its own; of --model.* only "
    "--model.padding counts.",
)
flags.DEFINE_string(
    "init",
    None,
    "What the teacher's training starts from instead of random weights: the encoder of a saved model, of a wav2vec2 or "
    "Moonshine checkpoint of Hugging Face, or of 'wheel', the Moonshine of the extra `moonshine`; the head starts "
    "anew.",
)
flags.DEFINE_integer(
    "head_steps",
    400,
    "Updates of the head alone, on the frozen encoder, before those of the whole teacher; with --init.",
    lower_bound=0,
)
flags.DEFINE_integer("teacher_steps", 3600, "Updates of the teacher.", lower_bound=1)
flags.DEFINE_list(
    "intermediate_ctc",
    None,
    "Layers, from 1, whose output also gets a CTC loss in the teacher's training (default: 4,8; none of a Moonshine).",
)
define_config("optimizer", OPTIMIZER)

# --- conversion
define_config("distil", CTCDistilConfig())


def experiment() -> None:
    """The whole job, from data to report."""
    # ---------------------------------------------------------------- settings, checked before anything is computed
    model_config = read_model_config()
    optimizer_config = read_config("optimizer", OPTIMIZER)
    distil_config = read_config("distil", CTCDistilConfig())
    batch_config = dataclasses.replace(
        read_config("batch", BATCH),
        seed=FLAGS.seed,
        batch_multiple=run.batch_multiple(),
    )
    splits = data_flags.test_splits()
    if FLAGS.teacher:
        teacher_model, tokenizer, about = open_teacher(FLAGS.teacher, FLAGS["model.padding"].value)
        model_config = teacher_model.config
    else:
        if FLAGS.intermediate_ctc is None and isinstance(model_config, Wav2Vec2Config):
            FLAGS["intermediate_ctc"].value = ["4", "8"]
        intermediate = int_list("intermediate_ctc", 1, model_config.num_layers)
        start = open_start(FLAGS.init, model_config) if FLAGS.init else None
    recipe = read_recipe(distil_config, model_config.num_layers)
    workdir = run.Workdir(FLAGS.workdir, run.flag_settings(), FLAGS.resume)

    # ---------------------------------------------------------------- data
    with workdir.stage("data"):
        train_set, dev_set, test_sets = data_flags.open_data(splits)
        if not FLAGS.teacher:
            tokenizer = tokenizer_flags.make_tokenizer(train_set)
            model_config = dataclasses.replace(model_config, vocab_size=tokenizer.vocab_size)
        source = BatchSource(train_set, tokenizer, batch_config, model_config.num_frames)
        whole = data_flags.whole_batches(batch_config)
        data = convert.Data(
            train_set,
            dev_set,
            test_sets,
            source,
            dev_source=BatchSource(dev_set, tokenizer, whole, model_config.num_frames),
            test_sources={s: BatchSource(corpus, None, whole) for s, corpus in test_sets.items()},
        )
        run.say(asr.describe(train_set, dev_set, test_sets, source))
    workdir.begin()

    # ---------------------------------------------------------------- teacher
    if not FLAGS.teacher:
        folder = workdir.path / "teacher"
        if not (folder / "model.json").exists():
            with workdir.stage("teacher"):
                teacher_model = train_teacher(
                    workdir.path,
                    model_config,
                    optimizer_config,
                    intermediate,
                    start,
                    source,
                    recipe.loop,
                )
                facts = {"data": train_set.kind, "steps": FLAGS.teacher_steps}
                save_pretrained(folder, teacher_model, tokenizer, facts)
        teacher_model, tokenizer, about = open_teacher(folder)

    # ---------------------------------------------------------------- sweep, replacement, controls, report
    convert.convert(
        "Attention to LPA: WER against the number of replaced layers",
        workdir,
        data,
        Teacher(teacher_model, CTCTask()),
        tokenizer,
        lambda graphdef: GreedyDecoder(graphdef, tokenizer),
        recipe,
        about,
    )


def read_model_config() -> Config:
    """The preset with the flags that were given.

    Raises:
        InputError: a value is out of range, or the preset's models have nothing of a flag's name.
    """
    preset = PRESETS[FLAGS.preset]()
    fields = {f"model.{field.name}" for field in dataclasses.fields(preset)}
    for name in FLAGS:
        given = name.startswith("model.") and FLAGS[name].value is not None
        if given and ".".join(name.split(".")[:2]) not in fields:
            raise InputError(f"--{name} is not for --preset={FLAGS.preset}: leave it out")
    return read_config("model", preset)


def open_teacher(
    path_or_id: str | Path, padding: Padding | None = None
) -> tuple[PlainCTC, Tokenizer, dict[str, Any]]:
    """A CTC model with its tokenizer, and what is known about it; see `open_model`.

    Raises:
        InputError: there is none.
    """
    model, tokenizer, about = open_model(path_or_id, padding)
    if not isinstance(model, PlainCTC) or not isinstance(tokenizer, Tokenizer):
        raise InputError(
            f"{path_or_id} is a {type(model).__name__}, and this program converts a model with a CTC head: see "
            "experiments.lpa_moonshine for a Moonshine, experiments.lpa_sepformer for a SepFormer"
        )
    return model, tokenizer, about


def open_start(path_or_id: str, config: Config) -> PlainCTC:
    """What the training of a model of this configuration starts from.

    Raises:
        InputError: there is none, or it is of another family.
    """
    start, _, _ = open_model(path_or_id)
    if isinstance(start, Moonshine):
        start = encoder_of(start, rngs=nnx.Rngs(FLAGS.seed))
    if not isinstance(start, PlainCTC) or not isinstance(start, MODELS[type(config)]):
        raise InputError(
            f"--init={path_or_id} is a {type(start).__name__} and --preset={FLAGS.preset} a "
            f"{MODELS[type(config)].__name__}: choose another preset"
        )
    return start


def model_settings(config: Config) -> dict:
    """What a teacher's checkpoints must have been made with."""
    return checkpoint_settings(config, newer=("padding",))


def train_teacher(
    workdir, model_config, optimizer_config, intermediate, start, source, loop
) -> PlainCTC:
    """A teacher with the moving average of its parameters."""
    model = MODELS[type(model_config)](model_config, rngs=nnx.Rngs(FLAGS.seed))
    model.scan_layers = True
    settings = {"model": model_settings(model_config)}
    if start is not None:
        copy_but_head(model, start, FLAGS.init)
        if FLAGS.head_steps:
            head, loss, prepare = head_objective(model)
            optimizer = OptimizerConfig(learning_rate=HEAD_RATE)
            head, _ = fit(
                "head",
                loss,
                head,
                source,
                FLAGS.head_steps,
                workdir=workdir,
                settings=settings,
                optimizer=optimizer,
                seed=FLAGS.seed,
                loop=loop,
                prepare=prepare,
            )
            nnx.update(model, head)
            settings["head_steps"] = FLAGS.head_steps
    graphdef, params = nnx.split(model)
    average, _ = fit(
        "teacher",
        ctc_objective(graphdef, intermediate),
        params,
        source,
        FLAGS.teacher_steps,
        workdir=workdir,
        settings=settings,
        optimizer=optimizer_config,
        seed=FLAGS.seed,
        loop=loop,
    )
    return nnx.merge(graphdef, average)


if __name__ == "__main__":
    program.main(experiment)
