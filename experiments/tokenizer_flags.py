"""The units of a CTC head: their flags, and the tokenizer that these make."""

from absl import flags

from edgespeech.data.corpus import Corpus
from edgespeech.data.tokenizer import CharTokenizer, SentencePieceTokenizer, Tokenizer

FLAGS = flags.FLAGS

flags.DEFINE_enum("tokenizer", "bpe", ["char", "bpe"], "Units of the CTC head.")
flags.DEFINE_integer(
    "bpe_size", 400, "Units of --tokenizer=bpe, learned from the training text.", lower_bound=32
)


def make_tokenizer(train_set: Corpus) -> Tokenizer:
    """Characters, or word pieces learned from the training text."""
    if FLAGS.tokenizer == "char":
        return CharTokenizer()
    return SentencePieceTokenizer.train([u.text for u in train_set.utterances], FLAGS.bpe_size)
