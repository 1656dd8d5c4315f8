"""Convert Moonshine, a pretrained encoder-decoder, from attention to Learnable Pulse Accumulation and report its WER.

Command     python -m experiments.lpa_moonshine --workdir=runs/moonshine
Needs       pip install 'edgespeech[moonshine]' for the weights of moonshine-base, or --teacher=DIR
Hardware    2 CPU cores in hours (stop it whenever you like, and go on with --resume); a GPU in minutes
Expect      WORKDIR/report.md: WER of the teacher and of hybrids with 2, 4, 6 and 8 of the 8 encoder layers replaced,
            beside three controls at 8. With the default, synthetic voices, the WER says more about those voices than
            about Moonshine: give it real speech.

On real speech, with transcripts only where the WER is measured:

    python -m experiments.lpa_moonshine --workdir=runs/moonshine --data=folder --data_dir=DIR \\
        --train_split=train-clean-100 --dev_split=dev-other --test_split=test-clean --max_train_hours=20

The targets of the student are what the teacher hears: its greedy texts of the training audio, kept in
WORKDIR/labels.jsonl, or in --shared. The student also learns the teacher's distribution of every token and its
encoder's hidden states. The decoder stays the teacher's. LPA has windows around every frame here (--lpa.octaves
is 4). The recipe is ours; LPA is Y. P. Shkolnikov's, arXiv 2603.16922.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from absl import flags
from flax import nnx

from edgespeech.conversion.labels import (
    Labelled,
    TokenIds,
    label_with_teacher,
    label_with_transcripts,
    teacher_texts,
)
from edgespeech.conversion.run import Teacher
from edgespeech.conversion.seq2seq_task import Seq2SeqDistilConfig, Seq2SeqTask
from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.data.corpus import Corpus, subset
from edgespeech.errors import InputError
from edgespeech.evaluation.decode import Seq2SeqDecoder
from edgespeech.interop.moonshine_tokenizer import PieceTokenizer
from edgespeech.interop.open_model import open_model
from edgespeech.models.moonshine import Moonshine
from edgespeech.nn.lpa_config import LPAConfig
from edgespeech.nn.rotary import RotarySelfAttention
from edgespeech.types import SAMPLE_RATE
from experiments import asr, convert, data_flags, program, run, shared
from experiments.flags import define_config, read_config
from experiments.recipe import read_recipe

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(convert)

BATCH = BatchConfig(batch_seconds=40, num_buckets=4, speed_factors=(0.9, 1.0, 1.1))

flags.DEFINE_string(
    "teacher",
    "wheel",
    "The Moonshine to convert: 'wheel', that of the extra `moonshine`; a folder that one was saved to; or a checkpoint "
    "of Hugging Face, its folder or its hub id.",
)
flags.DEFINE_enum(
    "labels",
    "teacher",
    ["teacher", "transcript"],
    "Targets of the student. teacher: what the teacher hears, so that the audio needs no transcripts; transcript: the "
    "corpus's own, in lower case.",
)
flags.DEFINE_float(
    "max_train_hours",
    5.0,
    "Train on so many hours at most, drawn at random from what is given.",
    lower_bound=0.0,
)
flags.DEFINE_float(
    "max_test_hours",
    None,
    "Test on so many hours at most of each split, drawn at random, the same for every --seed (default: all).",
    lower_bound=0.0,
)
define_config("batch", BATCH, skip=("shuffle", "seed", "batch_multiple"))
define_config("distil", Seq2SeqDistilConfig())


def experiment() -> None:
    """The whole job, from audio to report."""
    # ---------------------------------------------------------------- settings, checked before anything is computed
    distil_config = read_config("distil", Seq2SeqDistilConfig())
    batch_config = dataclasses.replace(
        read_config("batch", BATCH), seed=FLAGS.seed, batch_multiple=run.batch_multiple()
    )
    splits = data_flags.test_splits()
    model, tokenizer, about = open_model(FLAGS.teacher)
    if not isinstance(model, Moonshine) or not isinstance(tokenizer, PieceTokenizer):
        raise InputError(
            f"--teacher={FLAGS.teacher} is a {type(model).__name__}, not a Moonshine: convert it with "
            "experiments.lpa_librispeech"
        )
    if any(type(layer.mixer) is not RotarySelfAttention for layer in model.layers):
        raise InputError(
            f"--teacher={FLAGS.teacher} has layers without attention: name the model that it was made from"
        )
    recipe = read_recipe(distil_config, model.config.num_layers, LPAConfig.windows())
    workdir = run.Workdir(FLAGS.workdir, run.flag_settings(), FLAGS.resume)
    task = Seq2SeqTask(model.config.bos_id, model.config.eos_id)
    teacher = Teacher(model, task)

    def decoder(graphdef: nnx.GraphDef) -> Seq2SeqDecoder:
        return Seq2SeqDecoder(graphdef, tokenizer)

    # ---------------------------------------------------------------- data
    with workdir.stage("data"):
        audio, dev_set, test_sets = data_flags.open_data(splits, FLAGS.labels == "transcript")
        audio = at_most(audio, "max_train_hours", FLAGS.seed)
        if FLAGS.max_test_hours is not None:
            test_sets = {s: at_most(c, "max_test_hours", 0) for s, c in test_sets.items()}
        # Refuses batches that do not hold the audio before the teacher listens to it.
        BatchSource(audio, None, batch_config)
    workdir.begin()
    whole = data_flags.whole_batches(batch_config)
    with workdir.stage("labels"):
        if FLAGS.labels == "transcript":
            train_set = label_with_transcripts(audio, tokenizer)
        else:
            heard = teacher_texts(
                (shared.place("labels") or workdir.path) / "labels.jsonl",
                decoder(teacher.graphdef),
                teacher.state,
                audio,
                dataclasses.replace(whole, max_seconds=batch_config.max_seconds),
            )
            train_set = label_with_teacher(audio, heard)
    data = convert.Data(
        train_set,
        dev_set,
        test_sets,
        source=BatchSource(train_set, TokenIds(), batch_config),
        dev_source=BatchSource(dev_set, None, whole),
        test_sources={s: BatchSource(corpus, None, whole) for s, corpus in test_sets.items()},
    )
    run.say(asr.describe(train_set, dev_set, test_sets, data.source))

    # ---------------------------------------------------------------- sweep, replacement, controls, report
    convert.convert(
        "Moonshine's attention to LPA: WER against the number of replaced encoder layers",
        workdir,
        data,
        teacher,
        tokenizer,
        decoder,
        recipe,
        about | {"labels": label_facts(train_set)},
    )


def at_most(corpus: Corpus, flag: str, seed: int) -> Corpus:
    """Utterances drawn at random, in the corpus's order, that last the flag's hours at most; the corpus if it does."""
    hours = float(FLAGS[flag].value)  # pyright: ignore[reportArgumentType]
    if corpus.hours <= hours:
        return corpus
    order = np.argsort(np.random.default_rng(seed).random(len(corpus)), kind="stable")
    samples = np.cumsum([corpus.utterances[i].num_samples for i in order])
    chosen = order[samples <= hours * 3600 * SAMPLE_RATE]
    if not len(chosen):
        raise InputError(
            f"--{flag}={hours:g} does not hold a single utterance of {corpus.name!r}: raise it"
        )
    return subset(corpus, sorted(chosen.tolist()))


def label_facts(train_set: Labelled) -> Mapping:
    """What the report says of the targets."""
    tokens = sum(len(u.text.split()) for u in train_set.utterances)
    return {"kind": FLAGS.labels, "utterances": len(train_set), "tokens": tokens}


if __name__ == "__main__":
    program.main(experiment)
