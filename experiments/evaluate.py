"""Score a saved model on any split, by greedy decoding or by beam search with a language model, and keep what it heard.

Command     python -m experiments.evaluate --checkpoint=WORKDIR/hybrid_8 --data=folder --data_dir=DIR --split=test-clean
            (or --checkpoint=facebook/wav2vec2-base-960h --output=DIR, or the folder of such a checkpoint; or
            --checkpoint=wheel --output=DIR, the Moonshine of the extra `moonshine`);
            with --beam=16 --lm=FILE.arpa.gz --lm_weight=0.5 the beam search of a CTC model
Hardware    anything; 2 CPU cores decode the tiny preset at a few hundred times real time
Expect      WER with its 95% interval on the terminal, and CHECKPOINT/evaluations/NAME.json and NAME.jsonl: the score,
            and the reference, hypothesis and errors of every utterance; a beam search has its settings in the NAME
"""

import dataclasses
import datetime
import json
import re
import time
import typing
from pathlib import Path

import jax
from absl import flags

from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.errors import InputError
from edgespeech.evaluation.machine import device, versions
from edgespeech.interop.open_model import open_model
from edgespeech.models.sepformer import SepFormer
from edgespeech.models.wav2vec2 import Padding
from experiments import asr, decoders, program, split_flags
from experiments.decoders import make_decoder

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(split_flags)
flags.adopt_module_key_flags(decoders)

flags.DEFINE_string(
    "checkpoint",
    None,
    "A saved model, such as WORKDIR/teacher or WORKDIR/hybrid_8, or a wav2vec2 or Moonshine checkpoint of Hugging "
    "Face, its folder or its hub id, or 'wheel'.",
    required=True,
)
flags.DEFINE_float(
    "batch_seconds", 120.0, "Most seconds of padded audio in a batch.", lower_bound=1.0
)
flags.DEFINE_enum(
    "padding",
    None,
    typing.get_args(Padding),
    "exact: padding changes nothing; upstream: it counts as audio, as in PyTorch (default: the model's own, which for "
    "Hugging Face is exact).",
)
flags.DEFINE_string("output", None, "Folder of the results (default: CHECKPOINT/evaluations).")


def experiment() -> None:
    """Decode, score, write."""
    checkpoint = Path(FLAGS.checkpoint)
    model, tokenizer, about = open_model(FLAGS.checkpoint, FLAGS.padding)
    if tokenizer is None or isinstance(model, SepFormer):
        raise InputError(
            f"--checkpoint={FLAGS.checkpoint} is a {type(model).__name__}, which writes no text: choose a recogniser"
        )
    decoder, state, suffix = make_decoder(model, tokenizer)
    if not FLAGS.output and not checkpoint.is_dir():
        raise InputError(
            f"--checkpoint={FLAGS.checkpoint} is not a folder to write to: name one for the results, --output=DIR"
        )
    corpus = split_flags.open_split()
    longest = max(u.num_samples for u in corpus.utterances) / 16_000
    config = BatchConfig(
        batch_seconds=max(FLAGS.batch_seconds, (longest + 0.08) * jax.local_device_count()),
        max_seconds=float("inf"),
        shuffle=False,
        batch_multiple=jax.local_device_count(),
    )
    source = BatchSource(corpus, None, config)
    start = time.monotonic()
    result = decoder.score(state, source)
    seconds = time.monotonic() - start

    name = re.sub(r"[^\w.-]+", "_", f"{corpus.kind}_{FLAGS.split}{suffix}")
    folder = Path(FLAGS.output) if FLAGS.output else checkpoint / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    result.write_hypotheses(folder / f"{name}.jsonl")
    facts = {
        "checkpoint": FLAGS.checkpoint,
        "padding": getattr(model.config, "padding", "exact"),
        "search": {
            flag: getattr(FLAGS, flag)
            for flag in ("beam", "lm", "lm_weight", "word_bonus", "hot_words", "hot_bonus")
        }
        if FLAGS.beam
        else "greedy",
        "about": about,
        "data": {"kind": corpus.kind, "split": FLAGS.split} | asr.split_facts(corpus),
        "skipped": asr.skipped_counts([corpus], [source]),
        "score": result.to_json(),
        "seconds": seconds,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "device": device(),
    }
    (folder / f"{name}.json").write_text(
        json.dumps(facts, indent=2, default=dataclasses.asdict) + "\n"
    )
    synthetic = " (synthetic data)" if corpus.kind == "synthetic" else ""
    low, high = result.ci
    print(
        f"{FLAGS.split}{synthetic}: WER {result.wer:.2%} [{low:.2%}, {high:.2%}], CER {result.cer:.2%}, "
        f"{len(result.utterances)} utterances, {result.words} words, {seconds:.1f} s"
    )
    for corpus_note in corpus.notes:
        print(f"note: {corpus_note}")
    for skipped in (*corpus.skipped, *source.skipped):
        print(f"skipped {skipped.id}: {skipped.reason}")
    print(f"hypotheses: {folder / f'{name}.jsonl'}")


if __name__ == "__main__":
    program.main(experiment)
