"""What the recognition experiments share: evaluation, and the facts and pictures of their reports."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.conversion.capture import capture_gates
from edgespeech.conversion.layers import mixer_layers
from edgespeech.conversion.task import Task
from edgespeech.data.batching import Batch, BatchSource
from edgespeech.data.corpus import Corpus, Skipped
from edgespeech.evaluation.decode import Decoder
from edgespeech.evaluation.plots import loss_curves, pulses_over_spectrogram, sweep_bars, wer_curve
from edgespeech.evaluation.wer import WerResult, paired_bootstrap, score
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.ops.features import log_mel
from edgespeech.training.metrics import read_metrics

REASONS = {
    "CTC needs": "target longer than the frames",
    "the tokenizer lacks": "unknown characters",
    "is above max_seconds": "longer than max_seconds",
}


def evaluate(
    workdir: Path, name: str, decoder: Decoder, state: nnx.State, source: BatchSource
) -> WerResult:
    """Word errors of a model; the hypotheses stay in `hypotheses/NAME.jsonl`, from which a resumed run reads them."""
    path = workdir / "hypotheses" / f"{name}.jsonl"
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return score(*([row[key] for row in rows] for key in ("id", "reference", "hypothesis")))
    result = decoder.score(state, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    result.write_hypotheses(unfinished)
    unfinished.replace(path)
    return result


def evaluate_splits(
    workdir: Path,
    name: str,
    decoder: Decoder,
    state: nnx.State,
    sources: Mapping[str, BatchSource],
) -> dict[str, WerResult]:
    """Word errors of a model on every test split, by its name.

    The hypotheses of the first split stay under the model's name, those of the others in `hypotheses/NAME_SPLIT.jsonl`.
    """
    first = next(iter(sources))
    return {
        split: evaluate(
            workdir,
            name if split == first else re.sub(r"[^\w.+-]", "_", f"{name}_{split}"),
            decoder,
            state,
            source,
        )
        for split, source in sources.items()
    }


def spoken(results: Mapping[str, WerResult]) -> str:
    """WER of every split, for the terminal; a split that is alone needs no name."""
    if len(results) == 1:
        return "".join(f"WER {result.wer:.2%}" for result in results.values())
    return "WER " + ", ".join(f"{result.wer:.2%} ({split})" for split, result in results.items())


def rates(
    results: Mapping[str, WerResult], teacher: Mapping[str, WerResult] | None = None
) -> dict[str, Any]:
    """WER with its interval and CER on the first split, and the same of further ones under `splits`.

    Args:
        results: by split, the first one first.
        teacher: the same of the teacher; with it comes the difference from it, too.
    """
    rows = {}
    for split, result in results.items():
        rows[split] = {"wer": result.wer, "ci": list(result.ci), "cer": result.cer}
        if teacher is not None:
            rows[split]["delta_vs_teacher"] = difference(teacher[split], result)
    (_, first), *further = rows.items()
    return {**first, "splits": dict(further)} if further else first


def table_row(
    results: Mapping[str, WerResult],
    count: int,
    order: Sequence[int],
    model: nnx.Module,
    teacher: Mapping[str, WerResult] | None = None,
) -> dict:
    """The row of a model with the first `count` layers of the order replaced; see `rates`."""
    return rates(results, teacher) | {
        "replaced": count,
        "layers": sorted(i + 1 for i in order[:count]),
        "parameters": count_parameters(model),
    }


def difference(teacher: WerResult, hybrid: WerResult) -> dict:
    """WER of the hybrid less the teacher's, with the interval of a paired bootstrap."""
    paired = paired_bootstrap(teacher, hybrid)
    return {"difference": paired.difference, "ci": list(paired.ci)}


def split_facts(corpus: Corpus) -> dict:
    """Size of a split."""
    return {
        "utterances": len(corpus),
        "hours": corpus.hours,
        "speakers": len({u.speaker for u in corpus.utterances}),
    }


def skipped_counts(corpora: Iterable[Corpus], sources: Iterable[BatchSource]) -> dict[str, int]:
    """How many utterances were left out, by reason."""
    skipped: list[Skipped] = [s for part in (*corpora, *sources) for s in part.skipped]

    def kind(reason: str) -> str:
        return next(
            (name for start, name in REASONS.items() if start in reason), reason.split(":")[0]
        )

    return dict(Counter(kind(s.reason) for s in skipped))


def describe(train: Corpus, dev: Corpus, tests: Mapping[str, Corpus], source: BatchSource) -> str:
    """What the data is, for the terminal: sizes, padding waste, notes, and every skipped utterance by name."""
    several = len(tests) > 1
    named = [("train", train), ("dev", dev)]
    named += [(f"test {split}" if several else "test", corpus) for split, corpus in tests.items()]
    lines = []
    for split, corpus in named:
        facts = split_facts(corpus)
        lines.append(
            f"{split}: {corpus.kind}, {facts['utterances']} utterances, {facts['hours']:.2f} h, "
            f"{facts['speakers']} speakers"
        )
        lines += [f"  note: {note}" for note in corpus.notes]
    lines.append(
        f"batches: {len(source.shapes)} shapes, {source.steps_in_epoch(0)} steps an epoch, "
        f"padding waste {source.padding_waste:.1%}"
    )
    skipped = [s for part in (train, dev, *tests.values(), source) for s in part.skipped]
    lines += [f"  skipped {s.id}: {s.reason}" for s in skipped[:20]]
    if len(skipped) > 20:
        lines.append(f"  and {len(skipped) - 20} more skipped")
    return "\n".join(lines)


def describe_data(kind: str) -> str:
    """A sentence on the kind of data."""
    if kind == "synthetic":
        return (
            "speech synthesised by espeak-ng from a phrase grammar; "
            "train, dev and test share no voice and no sentence"
        )
    return f"read speech, kind {kind}"


def data_facts(
    train: Corpus, dev: Corpus, tests: Mapping[str, Corpus], source: BatchSource, others: Iterable
) -> dict[str, Any]:
    """What the report says of the data; test splits after the first are under `splits`.

    Args:
        train: what is trained on.
        dev: what the sweep measures its errors on.
        tests: by name, the first one first.
        source: training batches.
        others: sources of the other batches, for what they skip.
    """
    (first, test), *further = tests.items()
    facts = {
        "kind": train.kind,
        "description": describe_data(train.kind),
        "train": split_facts(train),
        "dev": split_facts(dev),
        "test": {"name": first, **split_facts(test)},
        "skipped": skipped_counts([train, dev, *tests.values()], [source, *others]),
        "padding_waste": source.padding_waste,
    }
    if further:
        facts["splits"] = {split: split_facts(corpus) for split, corpus in further}
    return facts


def draw(workdir: Path, report: dict, hybrid: Any, task: Task, source: BatchSource) -> None:
    """Draws sweep, WER curve, losses, and the pulses of one utterance into `plots/`."""
    plots = workdir / "plots"
    plots.mkdir(exist_ok=True)
    note = f"{report['data']['kind']} data"
    sweep_bars(plots / "sweep.png", report["sweep"], note)
    wer_curve(plots / "wer.png", report["teacher"], report["hybrids"], report["controls"], note)
    draw_losses(workdir, note)

    batch = next(source.eval_batches())
    row = int(np.argmax(batch.weights * batch.audio_lengths))
    samples = int(batch.audio_lengths[row])
    alone = Batch(*(part[row : row + 1] for part in batch))
    alone = alone._replace(audio=alone.audio[:, :samples])
    _, found = capture_gates(hybrid, alone, call=task.forward)
    mel = np.asarray(log_mel(jnp.asarray(alone.audio))[0])
    text = source.corpus.utterances[int(batch.index[row])].text
    for number, path in enumerate(mixer_layers(hybrid), 1):
        if path in found:
            pulses_over_spectrogram(
                plots / f"pulses_layer{number:02d}.png",
                mel,
                {kind: np.asarray(gate[0, 0]) for kind, gate in found[path].kinds.items()},
                hybrid.config.frame_seconds,
                f"Hard pulses of layer {number}, head 1 ({note}): {text}",
            )


def draw_losses(workdir: Path, note: str) -> None:
    """Draws the losses of every stage that has metrics into `plots/losses.png`."""
    losses = {}
    for path in sorted((workdir / "metrics").glob("*.jsonl")):
        rows = read_metrics(path)
        losses[path.stem] = ([row["step"] for row in rows], [row["loss"] for row in rows])
    if losses:
        loss_curves(workdir / "plots" / "losses.png", losses, note)
