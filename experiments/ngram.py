"""Estimate a word n-gram language model from transcripts or from text, for the beam search of a CTC model.

Command     python -m experiments.ngram --data=folder --data_dir=DIR --split=train-clean-100 --output=lm.arpa.gz
            (--text=FILE adds the lines of a text file, plain or .gz; --heldout=SPLIT tells how well it fits there)
Hardware    one CPU core; a million words a minute, all n-grams in memory
Expect      OUTPUT in the ARPA format, smoothed by modified Kneser-Ney, for `experiments.evaluate --beam=16 --lm=OUTPUT`
            and whatever else reads ARPA files; its size and its perplexity printed

Text for a test must not come from its split: the model would know the sentences.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from edgespeech.data.folder import normalise_text
from edgespeech.errors import InputError
from edgespeech.inference.kneser_ney import estimate_ngrams
from edgespeech.inference.language_model import perplexity, write_arpa
from experiments import program, split_flags

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(split_flags)
FLAGS.set_default("split", "train")

flags.DEFINE_integer("order", 3, "Words of the longest n-gram.", lower_bound=1, upper_bound=9)
flags.DEFINE_list(
    "text",
    [],
    "Files with a sentence a line, plain or .gz; without --data_dir they are all there is.",
)
flags.DEFINE_string("heldout", None, "Split to take the perplexity of; several joined by +.")
flags.DEFINE_string("output", None, "ARPA file to write, gzipped as .gz.", required=True)


def experiment() -> None:
    """Count, estimate, write."""
    if FLAGS.heldout and not has_corpus():
        raise InputError(f"--heldout={FLAGS.heldout} is a split of --data: give that too")
    model = estimate_ngrams(texts(), FLAGS.order)
    write_arpa(FLAGS.output, model)
    sizes = [sum(len(ngram) == n for ngram in model.entries) for n in range(1, FLAGS.order + 1)]
    print(f"{FLAGS.output}: {', '.join(f'{size} {n}-grams' for n, size in enumerate(sizes, 1))}")
    if FLAGS.heldout:
        corpus = split_flags.open_split(FLAGS.heldout)
        fit = perplexity(model, [u.text for u in corpus.utterances])
        print(
            f"{FLAGS.heldout}: perplexity {fit.perplexity:.1f} a word (ends counted), "
            f"{fit.unknown / fit.words:.2%} of {fit.words} words unknown and left out"
        )


def has_corpus() -> bool:
    """Whether the flags name a corpus and not text files alone."""
    return bool(FLAGS.data_dir) or FLAGS.data == "synthetic" or not FLAGS.text


def texts() -> Iterator[str]:
    """The transcripts of --split and the lines of --text, spelled like the models' text."""
    if has_corpus():
        yield from (u.text for u in split_flags.open_split().utterances)
    for path in map(Path, FLAGS.text):
        open_text = gzip.open if path.suffix == ".gz" else open
        try:
            with open_text(path, "rt", encoding="utf-8") as file:
                yield from map(normalise_text, file)
        except (EOFError, UnicodeDecodeError, gzip.BadGzipFile) as error:
            raise InputError(
                f"--text={path}: {error}: give UTF-8 text, plain or gzipped"
            ) from error


if __name__ == "__main__":
    program.main(experiment)
