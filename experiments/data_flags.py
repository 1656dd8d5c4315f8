"""The data that recognition programs train, tune and test on: their flags, and what these open."""

import dataclasses
from collections.abc import Sequence

from absl import flags

from edgespeech.data.batching import BatchConfig
from edgespeech.data.corpus import Corpus, join
from edgespeech.data.sources import KINDS, open_corpus
from edgespeech.data.synthetic import SyntheticConfig
from edgespeech.errors import InputError
from experiments import run
from experiments.flags import define_config, read_config

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(run)

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
    "dev_split",
    "dev",
    "Split on which choices are made (errors of a sweep, thresholds of exits); several joined by +.",
)
flags.DEFINE_string(
    "test_split",
    "test",
    "Splits that the WER is reported on, parted by commas; splits joined by + count as one.",
)
define_config("synthetic", SyntheticConfig(), skip=("seed",))


def test_splits() -> list[str]:
    """The splits in --test_split.

    Raises:
        InputError: one is named twice, or has no name.
    """
    names = FLAGS.test_split.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise InputError(
            f"--test_split={FLAGS.test_split} names a split twice or an empty one: give SPLIT or SPLIT,SPLIT2"
        )
    return names


def open_data(
    splits: Sequence[str], require_text: bool = True
) -> tuple[Corpus, Corpus, dict[str, Corpus]]:
    """Train, dev, and the test splits by name; with `require_text` off, train and dev need no transcripts."""
    synthetic = dataclasses.replace(read_config("synthetic", SyntheticConfig()), seed=FLAGS.seed)

    def corpus(split: str, data_dir: Sequence[str], require_text: bool = require_text) -> Corpus:
        return open_corpus(
            FLAGS.data,
            split,
            data_dir=data_dir,
            synthetic=synthetic,
            require_text=require_text,
            cache_dir=FLAGS.cache_dir,
        )

    train_set = corpus(FLAGS.train_split, FLAGS.data_dir)
    if FLAGS.more_train:
        train_set = join(
            [train_set, *(corpus(FLAGS.train_split, [entry]) for entry in FLAGS.more_train)]
        )
    return (
        train_set,
        corpus(FLAGS.dev_split, FLAGS.data_dir),
        {split: corpus(split, FLAGS.data_dir, True) for split in splits},
    )


def whole_batches(config: BatchConfig) -> BatchConfig:
    """Batches of the training's settings for what is only listened to: twice the size, at its own speed, up to 60 s."""
    return dataclasses.replace(
        config, max_seconds=60, speed_factors=(1.0,), batch_seconds=config.batch_seconds * 2
    )
