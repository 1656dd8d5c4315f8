"""The split that a program scores a saved model on: its flags, and what they open."""

from absl import flags

from edgespeech.data.corpus import Corpus
from edgespeech.data.sources import KINDS, open_corpus
from experiments import program

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)

flags.DEFINE_enum(
    "data",
    "folder",
    KINDS,
    "synthetic: espeak-ng voices; folder: LibriSpeech trees; tfds: prepared shards.",
)
flags.DEFINE_list("data_dir", [], "Folders of --data=folder or tfds.")
flags.DEFINE_string("split", "test", "Split to score; several joined by +.")


def open_split(split: str | None = None) -> Corpus:
    """A split of the flags' corpus; None: that of --split."""
    return open_corpus(
        FLAGS.data, split or FLAGS.split, data_dir=FLAGS.data_dir, cache_dir=FLAGS.cache_dir
    )
