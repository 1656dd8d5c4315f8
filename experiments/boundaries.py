"""Do pulses find words? Edges and widths of a hybrid's pulses beside the boundaries of a forced alignment.

Command     python -m experiments.boundaries --checkpoint=WORKDIR/hybrid_8 --aligner=WORKDIR/teacher \\
                --data=folder --data_dir=DIR --split=dev-clean --output=runs/boundaries
Hardware    2 CPU cores, a few minutes for 50 utterances
Expect      OUTPUT/report.md and report.json: for every layer with pulses that content places (rectangles, runs) the F1
            of their edges against word and token boundaries at 20, 40 and 80 ms, beside as many edges in random
            places and at equal distances; their widths; the periods of periodic pulses; and pictures over spectrograms

The aligner is any CTC model here, such as the teacher or facebook/wav2vec2-base-960h; the hybrid may be a Moonshine.
Boundaries are no sharper than the aligner's frames, and the corpus's transcripts must be right. All of it is ours.
"""

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from edgespeech.conversion.capture import capture_gates
from edgespeech.conversion.layers import mixer_layers
from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.data.corpus import subset
from edgespeech.data.tokenizer import Tokenizer
from edgespeech.errors import InputError
from edgespeech.evaluation.boundaries import align, boundaries, pulse_widths, token_spans
from edgespeech.evaluation.boundary_report import (
    TOLERANCES,
    Heard,
    edge_rows,
    gain,
    write_boundary_report,
)
from edgespeech.evaluation.machine import device, versions
from edgespeech.evaluation.plots import pulses_over_spectrogram
from edgespeech.inference.words import token_texts, words_of_path
from edgespeech.interop.ctc_model import PlainCTC
from edgespeech.interop.open_model import open_model
from edgespeech.models.moonshine import Moonshine
from edgespeech.nn.lpa import LPA
from edgespeech.ops.ctc import BLANK, ctc_log_probs
from edgespeech.ops.features import log_mel
from edgespeech.ops.pulse import log_spaced_periods
from experiments import asr, program, split_flags

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(split_flags)

flags.DEFINE_string("checkpoint", None, "A saved hybrid, such as WORKDIR/hybrid_8.", required=True)
flags.DEFINE_string(
    "aligner",
    None,
    "The CTC model that says where words are: a saved one, or a wav2vec2 checkpoint of Hugging Face.",
    required=True,
)
flags.DEFINE_integer(
    "utterances", 50, "So many utterances at most, spread over the split.", lower_bound=1
)
flags.DEFINE_integer("pictures", 1, "Draw the layers of so many utterances.", lower_bound=0)
flags.DEFINE_string("output", None, "Folder of the report.", required=True)

PLACED = ("aperiodic", "runs")  # kinds whose pulses content places


class Subject(NamedTuple):
    """The hybrid, as far as it is looked at.

    Attributes:
        lpas: its mixers by layer, from 1.
        gates: compiled, `(audio, lengths) -> {layer: {kind: [b h p n]}}`, of `PLACED`.
        config: of the model.
    """

    lpas: dict[int, LPA]
    gates: Any
    config: Any


def experiment() -> None:
    """Align, compare, report."""
    model, _, about = open_model(FLAGS.checkpoint)
    subject = open_subject(model)
    aligner, tokenizer, _ = open_model(FLAGS.aligner)
    if not isinstance(aligner, PlainCTC) or not isinstance(tokenizer, Tokenizer):
        raise InputError(
            f"--aligner={FLAGS.aligner} is a {type(aligner).__name__}: give a model with a CTC head"
        )
    corpus = split_flags.open_split()
    spread = np.linspace(0, len(corpus) - 1, min(FLAGS.utterances, len(corpus))).round()
    corpus = subset(corpus, spread.astype(int).tolist())
    config = BatchConfig(batch_seconds=60, max_seconds=30, shuffle=False)
    source = BatchSource(corpus, tokenizer, config, aligner.config.num_frames)

    utterances = list(listen(subject, aligner, tokenizer, source))
    folder = Path(FLAGS.output)
    rows = edge_rows(utterances, subject.config.frame_seconds)
    draw(folder / "plots", subject, utterances[: FLAGS.pictures], rows, corpus)
    report = {
        "title": f"pulses of {FLAGS.checkpoint}",
        "command": program.command_line(),
        "date": datetime.date.today().isoformat(),
        "checkpoint": {"path": FLAGS.checkpoint, "about": about}
        | {"frame_seconds": subject.config.frame_seconds},
        "aligner": {"path": FLAGS.aligner, "frame_seconds": aligner.config.frame_seconds},
        "data": {
            "kind": corpus.kind,
            "description": asr.describe_data(corpus.kind),
            "split": FLAGS.split,
        }
        | asr.split_facts(corpus),
        "skipped": asr.skipped_counts([corpus], [source]),
        "tolerances": list(TOLERANCES),
        "boundaries": {
            kind: sum(len(u.boundaries[kind]) for u in utterances) for kind in ("words", "tokens")
        },
        "edges": rows,
        "widths": list(width_rows(utterances, subject.config.frame_seconds)),
        "periods": list(period_rows(subject)),
        "versions": versions(),
        "device": device(),
    }
    write_boundary_report(folder, report)
    print(f"report: {folder / 'report.md'}")


def open_subject(model: Any) -> Subject:
    """The gates of a hybrid.

    Raises:
        InputError: it has no LPA with pulses that content places.
    """
    numbers = {path: number for number, path in enumerate(mixer_layers(model), 1)}
    layers = zip(numbers.values(), mixer_layers(model).values(), strict=True)
    lpas = {number: layer.mixer for number, layer in layers if isinstance(layer.mixer, LPA)}
    if not any(lpa.config.aperiodic or lpa.config.runs for lpa in lpas.values()):
        raise InputError(
            f"--checkpoint={FLAGS.checkpoint} has no LPA with rectangles or runs: name a hybrid that has"
        )
    graphdef, state = nnx.split(model)

    @jax.jit
    def gates(state, audio, lengths):
        hybrid = nnx.merge(graphdef, state)
        call = Moonshine.encode if isinstance(hybrid, Moonshine) else None
        _, found = capture_gates(hybrid, audio, lengths, call=call)
        return {
            numbers[path]: {kind: gate > 0.5 for kind, gate in kinds.items() if kind in PLACED}
            for path, (kinds, _) in found.items()
        }

    return Subject(lpas, lambda audio, lengths: gates(state, audio, lengths), model.config)


def listen(
    subject: Subject, aligner: PlainCTC, tokenizer: Tokenizer, source: BatchSource
) -> Iterator[Heard]:
    """Every utterance, aligned, with the hybrid's pulses."""
    graphdef, state = nnx.split(aligner)
    texts = token_texts(tokenizer)
    seconds = aligner.config.frame_seconds

    @jax.jit
    def log_probs(state, audio, lengths):
        return ctc_log_probs(nnx.merge(graphdef, state)(audio, lengths).logits)

    for batch in source.eval_batches():
        scores = np.asarray(log_probs(state, batch.audio, batch.audio_lengths))
        gates = jax.device_get(subject.gates(batch.audio, batch.audio_lengths))
        for row in np.flatnonzero(batch.weights):
            samples = int(batch.audio_lengths[row])
            target = batch.targets[row, : batch.target_lengths[row]]
            alignment = align(scores[row, : aligner.config.num_frames(samples)], target)
            path = [target[i] if i >= 0 else BLANK for i in alignment]
            words = words_of_path(path, texts, seconds)
            spans = np.array([(word.start, word.end) for word in words]).reshape(-1, 2)
            frames = subject.config.num_frames(samples)
            yield Heard(
                index=int(batch.index[row]),
                words=words,
                boundaries={
                    "words": boundaries(spans),
                    "tokens": boundaries(token_spans(alignment)) * seconds,
                },
                frames=frames,
                gates={
                    (number, kind): gate[row, ..., :frames]
                    for number, kinds in gates.items()
                    for kind, gate in kinds.items()
                },
            )


def width_rows(utterances: list[Heard], frame_seconds: float) -> Iterator[dict[str, Any]]:
    """How long the pulses of each layer are, in seconds."""
    for layer, kind in utterances[0].gates:
        gates = (u.gates[layer, kind] for u in utterances)
        frames = np.concatenate([pulse_widths(g.reshape(-1, g.shape[-1])) for g in gates])
        seconds = frames * frame_seconds
        shares = (10, 50, 90)
        quantiles = np.percentile(seconds, shares) if seconds.size else [np.nan] * 3
        yield {
            "layer": layer,
            "kind": kind,
            "pulses": len(seconds),
            **{f"p{share}": float(q) for share, q in zip(shares, quantiles, strict=True)},
        }


def period_rows(subject: Subject) -> Iterator[dict[str, Any]]:
    """The periodic pulses of each layer by their share of |alpha|, the largest first."""
    for layer, lpa in subject.lpas.items():
        c = lpa.config
        if not c.periodic:
            continue
        first = c.aperiodic + c.runs
        alpha = np.abs(np.asarray(lpa.alpha[...]))
        share = alpha[:, first : first + c.periodic] / alpha.sum()
        frames = log_spaced_periods(lpa.num_heads, c.periodic, c.max_period)
        duty = np.asarray(jax.nn.sigmoid(lpa.duty_logit[...]))
        order = np.argsort(-share, axis=None)
        yield {
            "layer": layer,
            "share": float(share.sum()),
            "pulses": [
                {
                    "seconds": float(frames.flat[i] * subject.config.frame_seconds),
                    "duty": float(duty.flat[i]),
                    "share": float(share.flat[i]),
                }
                for i in order
            ],
        }


def draw(folder: Path, subject: Subject, utterances: list[Heard], rows: list[dict], corpus) -> None:
    """Draws the pulses of every layer's best head over the spectrogram, with the words of the alignment."""
    for heard in utterances:
        utterance = corpus.utterances[heard.index]
        mel = np.asarray(log_mel(jnp.asarray(corpus.audio(heard.index)[None]))[0])
        for layer in sorted({layer for layer, _ in heard.gates}):
            best = max((r for r in rows if r["layer"] == layer and r["head"]), key=gain)
            kinds = {
                kind: gate[best["head"] - 1].astype(float)
                for (number, kind), gate in heard.gates.items()
                if number == layer
            }
            pulses_over_spectrogram(
                folder / f"{utterance.id}_layer{layer:02d}.png",
                mel,
                kinds,
                subject.config.frame_seconds,
                f"Layer {layer}, head {best['head']} ({corpus.kind} data): {utterance.text}",
                [(word.text, word.start, word.end) for word in heard.words],
            )


if __name__ == "__main__":
    program.main(experiment)
