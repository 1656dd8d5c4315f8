"""The arguments of a tiny run of the conversion program, and a way to run it inside the tests' process."""

import sys

import jax
from absl import flags
from absl.testing import flagsaver

from experiments import lpa_librispeech, program
from tests.support.tiny import TINY_SIZES, ToneCorpus, write_librispeech

PROGRAM = "experiments.lpa_librispeech"
TINY_RUN = [
    *(f"--model.{name}={value}" for name, value in TINY_SIZES.items()),
    *("--intermediate_ctc=1", "--replaced=1,2", "--controls=sliding_window,removed", "--window=2"),
    *("--lpa.aperiodic=2", "--lpa.periodic=1", "--lpa.positional=1"),
    *("--lpa.kernel_size=3", "--lpa.local_kernel_size=3"),
    *("--teacher_steps=4", "--sweep_steps=3", "--distil.steps_per_layer=3", "--save_every=2"),
    *("--batch.batch_seconds=2.3", "--batch.num_buckets=1", "--batch.speed_factors=1"),
    *("--data=folder", "--tokenizer=char", "--model.conv_strides=2"),
]


def write_tones(root):
    """A LibriSpeech tree of tones with the splits train, dev and test."""
    for seed, (split, count) in enumerate((("train", 6), ("dev", 4), ("test", 4))):
        write_librispeech(root, split, ToneCorpus(count, seed, split))
    return root


def run_inside(arguments, monkeypatch, capsys):
    """Runs the program in this process: its exit status, standard output and standard error."""
    cache = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(sys, "argv", [PROGRAM, *map(str, arguments)])
    capsys.readouterr()
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        try:
            program.main(lpa_librispeech.experiment)
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            jax.config.update("jax_compilation_cache_dir", cache)
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
    printed = capsys.readouterr()
    return status, printed.out, printed.err
