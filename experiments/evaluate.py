"""Score a saved teacher or hybrid on any split by greedy CTC, and keep what it heard.

Command     python -m experiments.evaluate --checkpoint=WORKDIR/hybrid_8 --data=folder --data_dir=DIR --split=test-clean
Hardware    anything; 2 CPU cores decode the tiny preset at a few hundred times real time
Expect      WER with its 95% interval on the terminal, and CHECKPOINT/evaluations/NAME.json and NAME.jsonl: the score,
            and the reference, hypothesis and errors of every utterance
"""

import dataclasses
import datetime
import json
import re
import time
from pathlib import Path

import jax
from absl import flags
from flax import nnx

from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.data.sources import KINDS, open_corpus
from edgespeech.evaluation.decode import GreedyDecoder
from edgespeech.evaluation.report import device, versions
from edgespeech.interop.pretrained import load_pretrained
from experiments import asr, program

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)

flags.DEFINE_string(
    "checkpoint",
    None,
    "Folder of a saved model, such as WORKDIR/teacher or WORKDIR/hybrid_8.",
    required=True,
)
flags.DEFINE_enum(
    "data",
    "folder",
    KINDS,
    "synthetic: espeak-ng voices; folder: LibriSpeech trees; tfds: prepared shards.",
)
flags.DEFINE_list("data_dir", [], "Folders of --data=folder or tfds.")
flags.DEFINE_string("split", "test", "Split to score; several joined by +.")
flags.DEFINE_float(
    "batch_seconds", 120.0, "Most seconds of padded audio in a batch.", lower_bound=1.0
)
flags.DEFINE_string("output", None, "Folder of the results (default: CHECKPOINT/evaluations).")


def experiment() -> None:
    """Decode, score, write."""
    checkpoint = Path(FLAGS.checkpoint)
    model, tokenizer, about = load_pretrained(checkpoint)
    corpus = open_corpus(
        FLAGS.data, FLAGS.split, data_dir=FLAGS.data_dir, cache_dir=FLAGS.cache_dir
    )
    longest = max(u.num_samples for u in corpus.utterances) / 16_000
    config = BatchConfig(
        batch_seconds=max(FLAGS.batch_seconds, (longest + 0.08) * jax.local_device_count()),
        max_seconds=float("inf"),
        shuffle=False,
        batch_multiple=jax.local_device_count(),
    )
    source = BatchSource(corpus, None, config)
    graphdef, state = nnx.split(model)
    start = time.monotonic()
    result = GreedyDecoder(graphdef, tokenizer).score(state, source)
    seconds = time.monotonic() - start

    name = re.sub(r"[^\w.-]+", "_", f"{corpus.kind}_{FLAGS.split}")
    folder = Path(FLAGS.output) if FLAGS.output else checkpoint / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    result.write_hypotheses(folder / f"{name}.jsonl")
    facts = {
        "checkpoint": str(checkpoint),
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
