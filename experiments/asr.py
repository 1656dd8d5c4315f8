"""What the recognition experiments share: evaluation, and the facts and pictures of their reports."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.conversion.capture import capture
from edgespeech.conversion.layers import mixer_layers
from edgespeech.data.batching import BatchSource
from edgespeech.data.corpus import Corpus, Skipped
from edgespeech.evaluation.decode import GreedyDecoder
from edgespeech.evaluation.plots import loss_curves, pulses_over_spectrogram, sweep_bars, wer_curve
from edgespeech.evaluation.wer import WerResult, paired_bootstrap, score
from edgespeech.models.wav2vec2 import Wav2Vec2, count_parameters
from edgespeech.nn.lpa import LPA
from edgespeech.ops.features import log_mel
from edgespeech.training.metrics import read_metrics

REASONS = {
    "CTC needs": "target longer than the frames",
    "the tokenizer lacks": "unknown characters",
    "is above max_seconds": "longer than max_seconds",
}


def evaluate(
    workdir: Path, name: str, decoder: GreedyDecoder, state: nnx.State, source: BatchSource
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


def rates(result: WerResult) -> dict:
    """WER with its interval, and CER."""
    return {"wer": result.wer, "ci": list(result.ci), "cer": result.cer}


def table_row(result: WerResult, count: int, order: Sequence[int], model: nnx.Module) -> dict:
    """The row of a model with the first `count` layers of the order replaced."""
    return rates(result) | {
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


def describe(train: Corpus, dev: Corpus, test: Corpus, source: BatchSource) -> str:
    """What the data is, for the terminal: sizes, padding waste, notes, and every skipped utterance by name."""
    lines = []
    for split, corpus in (("train", train), ("dev", dev), ("test", test)):
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
    skipped = [*train.skipped, *dev.skipped, *test.skipped, *source.skipped]
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


def draw(workdir: Path, report: dict, hybrid: Wav2Vec2, source: BatchSource) -> None:
    """Draws sweep, WER curve, losses, and the pulses of one utterance into `plots/`."""
    plots = workdir / "plots"
    plots.mkdir(exist_ok=True)
    note = f"{report['data']['kind']} data"
    sweep_bars(plots / "sweep.png", report["sweep"], note)
    wer_curve(plots / "wer.png", report["teacher"], report["hybrids"], report["controls"], note)
    losses = {}
    for path in sorted((workdir / "metrics").glob("*.jsonl")):
        rows = read_metrics(path)
        losses[path.stem] = ([row["step"] for row in rows], [row["loss"] for row in rows])
    if losses:
        loss_curves(plots / "losses.png", losses, note)

    batch = next(source.eval_batches())
    row = int(np.argmax(batch.weights * batch.audio_lengths))
    samples = int(batch.audio_lengths[row])
    audio, lengths = batch.audio[row : row + 1, :samples], batch.audio_lengths[row : row + 1]
    _, calls = capture(hybrid, audio, lengths)
    mel = np.asarray(log_mel(jnp.asarray(audio))[0])
    text = source.corpus.utterances[int(batch.index[row])].text
    for number, layer in enumerate(mixer_layers(hybrid).values(), 1):
        if isinstance(layer.mixer, LPA):
            gates = layer.mixer.gates(calls[number - 1].x, calls[number - 1].lengths)
            pulses_over_spectrogram(
                plots / f"pulses_layer{number:02d}.png",
                mel,
                {kind: np.asarray(gate[0, 0]) for kind, gate in gates.items()},
                hybrid.config.frame_seconds,
                f"Hard pulses of layer {number}, head 1 ({note}): {text}",
            )
