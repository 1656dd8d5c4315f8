"""What every exit of a model hears in a corpus, and the scores by which the exit rules judge it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import numpy as np
from flax import nnx

from edgespeech.data.batching import BatchSource
from edgespeech.data.corpus import MALFORMED_NPZ, write_atomically
from edgespeech.errors import InputError
from edgespeech.evaluation.decode import TextOfIds
from edgespeech.evaluation.wer import WerResult, score
from edgespeech.inference.exit_criteria import ExitRule, all_exit_scores
from edgespeech.inference.exit_predictor import FEATURES, all_exit_features
from edgespeech.ops.ctc import BLANK


class ExitScores(NamedTuple):
    """A split as e exits of a model hear it: u utterances, in the corpus's order.

    Attributes:
        results: word errors of every exit.
        rules: scores `[e u]` of every rule of `exit_criteria`.
        features: `[e u f]`, from `exit_features`.
        frames: `[u]`, encoder frames.
        samples: `[u]`, samples at 16 kHz.
    """

    results: tuple[WerResult, ...]
    rules: Mapping[str, np.ndarray]
    features: np.ndarray
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
            passed = output.embedded, output.hidden, output.exit_logits, output.lengths
            scores, tokens = {}, None
            for rule in get_args(ExitRule):
                scores[rule], tokens = all_exit_scores(rule, *passed, n_best)
            return tokens, scores, all_exit_features(*passed), output.lengths

        self._run = run

    def score(self, state: nnx.State, source: BatchSource) -> ExitScores:
        """Every utterance of a source, in the corpus's order."""
        heard: dict[int, list[str]] = {}
        found: dict[int, dict[str, np.ndarray]] = {}
        features: dict[int, np.ndarray] = {}
        frames: dict[int, int] = {}
        for batch in source.eval_batches():
            outputs = self._run(state, batch.audio, batch.audio_lengths)
            tokens, scores, known, lengths = jax.device_get(outputs)
            for column, row in enumerate(batch.index.tolist()):
                if row < 0:
                    continue
                heard[row] = [self._text(exit_tokens) for exit_tokens in tokens[:, column]]
                found[row] = {rule: values[:, column] for rule, values in scores.items()}
                features[row] = known[:, column]
                frames[row] = int(lengths[column])
        rows = sorted(heard)
        utterances = [source.corpus.utterances[row] for row in rows]
        ids, references = [u.id for u in utterances], [u.text for u in utterances]
        by_exit = zip(*(heard[row] for row in rows), strict=True)
        return ExitScores(
            tuple(score(ids, references, list(texts)) for texts in by_exit),
            {rule: np.stack([found[row][rule] for row in rows], axis=1) for rule in found[rows[0]]},
            np.stack([features[row] for row in rows], axis=1),
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
    arrays |= {name: getattr(scores, name) for name in ("features", "frames", "samples")}
    path = workdir / "exits" / f"{name}.npz"
    write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def load_exit_scores(workdir: Path, name: str) -> ExitScores | None:
    """What `save_exit_scores` wrote; None where it has not finished, or was of a version with fewer features.

    Raises:
        InputError: a file is damaged.
    """
    path = workdir / "exits" / f"{name}.npz"
    if not path.exists():
        return None
    try:
        return _read_exit_scores(workdir, name, path)
    except MALFORMED_NPZ as error:
        raise InputError(
            f"{path} or the hypotheses of {name} are damaged ({error!r}): delete {path}, and the exits are scored again"
        ) from error


def _read_exit_scores(workdir: Path, name: str, path: Path) -> ExitScores | None:
    with np.load(path, allow_pickle=False) as arrays:
        rules = {
            key.removeprefix("rule_"): arrays[key] for key in arrays if key.startswith("rule_")
        }
        if "features" not in arrays or arrays["features"].shape[-1] != len(FEATURES):
            return None
        features, frames, samples = (arrays[name] for name in ("features", "frames", "samples"))
    e, u, _ = features.shape
    shapes = {values.shape for values in rules.values()}
    if (shapes, frames.shape, samples.shape) != ({(e, u)}, (u,), (u,)):
        raise ValueError(f"scores of shapes {shapes} for {e} exits and {u} utterances")
    results = []
    for exit in range(1, e + 1):
        lines = _hypotheses(workdir, name, exit).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        results.append(
            score(*([row[key] for row in rows] for key in ("id", "reference", "hypothesis")))
        )
    return ExitScores(tuple(results), rules, features, frames, samples)


def _hypotheses(workdir: Path, name: str, exit: int) -> Path:
    return workdir / "hypotheses" / f"{name}_exit{exit}.jsonl"
