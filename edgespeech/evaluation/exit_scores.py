"""What every exit of a model hears in a corpus, and the scores by which the exit rules judge it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import numpy as np
from flax import nnx

from edgespeech.data.batching import BatchSource
from edgespeech.data.corpus import write_atomically
from edgespeech.evaluation.decode import TextOfIds
from edgespeech.evaluation.wer import WerResult, score
from edgespeech.inference.exit_criteria import ExitRule, all_exit_scores
from edgespeech.ops.ctc import BLANK


class ExitScores(NamedTuple):
    """A split as e exits of a model hear it: u utterances, in the corpus's order.

    Attributes:
        results: word errors of every exit.
        rules: scores `[e u]` of every rule of `exit_criteria`.
        frames: `[u]`, encoder frames.
        samples: `[u]`, samples at 16 kHz.
    """

    results: tuple[WerResult, ...]
    rules: Mapping[str, np.ndarray]
    frames: np.ndarray
    samples: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """Word errors `[e u]`."""
        return np.array([[row.errors for row in r.utterances] for r in self.results])

    @property
    def words(self) -> np.ndarray:
        """Words of the references `[u]`."""
        return np.array([row.words for row in self.results[0].utterances])


class ExitDecoder:
    """Greedy transcripts and scores of every exit, from one pass through the whole model.

    Args:
        graphdef: of a model that returns an `ExitOutput`.
        tokenizer: turns tokens into text.
        n_best: label sequences of the rule `posterior`.
    """

    def __init__(self, graphdef: nnx.GraphDef, tokenizer: TextOfIds, n_best: int):
        self._tokenizer = tokenizer

        @jax.jit
        def run(state, audio, audio_lengths):
            output = nnx.merge(graphdef, state)(audio, audio_lengths)
            scores, tokens = {}, None
            for rule in get_args(ExitRule):
                scores[rule], tokens = all_exit_scores(
                    rule, output.embedded, output.hidden, output.exit_logits, output.lengths, n_best
                )
            return tokens, scores, output.lengths

        self._run = run

    def score(self, state: nnx.State, source: BatchSource) -> ExitScores:
        """Every utterance of a source, in the corpus's order."""
        heard: dict[int, list[str]] = {}
        found: dict[int, dict[str, np.ndarray]] = {}
        frames: dict[int, int] = {}
        for batch in source.eval_batches():
            outputs = self._run(state, batch.audio, batch.audio_lengths)
            tokens, scores, lengths = jax.device_get(outputs)
            for column, row in enumerate(batch.index.tolist()):
                if row < 0:
                    continue
                heard[row] = [self._text(exit_tokens) for exit_tokens in tokens[:, column]]
                found[row] = {rule: values[:, column] for rule, values in scores.items()}
                frames[row] = int(lengths[column])
        rows = sorted(heard)
        utterances = [source.corpus.utterances[row] for row in rows]
        ids, references = [u.id for u in utterances], [u.text for u in utterances]
        by_exit = zip(*(heard[row] for row in rows), strict=True)
        return ExitScores(
            tuple(score(ids, references, list(texts)) for texts in by_exit),
            {rule: np.stack([found[row][rule] for row in rows], axis=1) for rule in found[rows[0]]},
            np.array([frames[row] for row in rows]),
            np.array([u.num_samples for u in utterances]),
        )

    def _text(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(tokens[tokens != BLANK].tolist())


def save_exit_scores(workdir: Path, name: str, scores: ExitScores) -> None:
    """Writes `hypotheses/NAME_exitM.jsonl` of every exit, M from 1, and last of all `exits/NAME.npz`."""
    for exit, result in enumerate(scores.results, 1):
        path = _hypotheses(workdir, name, exit)
        path.parent.mkdir(parents=True, exist_ok=True)
        result.write_hypotheses(path)
    arrays = {f"rule_{rule}": values for rule, values in scores.rules.items()}
    arrays |= {"frames": scores.frames, "samples": scores.samples}
    path = workdir / "exits" / f"{name}.npz"
    write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def load_exit_scores(workdir: Path, name: str) -> ExitScores | None:
    """What `save_exit_scores` wrote, or None where it has not finished."""
    path = workdir / "exits" / f"{name}.npz"
    if not path.exists():
        return None
    with np.load(path) as arrays:
        rules = {
            key.removeprefix("rule_"): arrays[key] for key in arrays if key.startswith("rule_")
        }
        frames, samples = arrays["frames"], arrays["samples"]
    results = []
    for exit in range(1, len(next(iter(rules.values()))) + 1):
        lines = _hypotheses(workdir, name, exit).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        results.append(
            score(*([row[key] for row in rows] for key in ("id", "reference", "hypothesis")))
        )
    return ExitScores(tuple(results), rules, frames, samples)


def _hypotheses(workdir: Path, name: str, exit: int) -> Path:
    return workdir / "hypotheses" / f"{name}_exit{exit}.jsonl"
