"""Will going deeper pay? Logistic regression on what an exit knows of itself, fitted on a dev set (ours).

    p_m = sigmoid(w_m . x_m + b_m)      the probability that no deeper exit has fewer word errors than exit m

The oracle leaves at the first exit of which that is true; the rule `calibrated` at the first one whose p_m is at or
above a threshold. The features x are sums over frames and one edit distance, and the regression is a dot product, so
the rule stays on the device.

| feature | of an exit |
|---|---|
| `log_entropy` | log of the mean entropy of a frame |
| `log_doubt` | log of 1 - the mean of a frame's largest probability |
| `similarity` | mean cosine of the block's input and output |
| `agrees` | 1 if the transcript is that of the exit before |
| `log_frames` | log of the number of frames |
| `change` | edit distance to the transcript of the exit before, by the longer's labels |
| `log_labelled` | log of the mean probability that a frame is not blank |

Logarithms, because their sums are logarithms of totals: `log_entropy + log_frames` is that of an utterance, and
`log_entropy - log_labelled` that of a labelled frame.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from edgespeech.data.corpus import write_atomically
from edgespeech.errors import InputError
from edgespeech.inference.exit_criteria import (
    exits_agreeing,
    greedy_tokens,
    layer_similarity,
    mean_entropy,
    mean_label_probability,
    mean_max_probability,
    transcript_change,
)
from edgespeech.types import Array, Bool, Float, Frames, Int, Lengths, Logits

FORMAT = 1
FILE_NAME = "exit_predictor.json"
FEATURES = (
    "log_entropy",
    "log_doubt",
    "similarity",
    "agrees",
    "log_frames",
    "change",
    "log_labelled",
)
TINY = 1e-6  # keeps the logarithms finite
MOST_STEPS = 100


class ExitPredictor(NamedTuple):
    """A regression for every exit but the last, at which everyone leaves.

    Attributes:
        weights: w, `[e-1 f]`.
        bias: b, `[e-1]`.
    """

    weights: np.ndarray
    bias: np.ndarray


def exit_features(
    before: Frames,
    after: Frames,
    logits: Logits,
    lengths: Lengths,
    tokens: Int[Array, "b n"],
    previous_tokens: Int[Array, "b n"],
    agreeing: Int[Array, "b"],
) -> Float[Array, "b f"]:
    """The features of an exit, in the order of `FEATURES`.

    Args:
        before: `[b n d]`, input of the exit's block.
        after: `[b n d]`, its output.
        logits: `[b n v]` of the exit.
        lengths: `[b]`.
        tokens: of the exit, from `greedy_tokens`.
        previous_tokens: of the exit before; blanks at the first one.
        agreeing: `[b]`, from `exits_agreeing`.
    """
    columns = (
        jnp.log(mean_entropy(logits, lengths) + TINY),
        jnp.log(jnp.maximum(1.0 - mean_max_probability(logits, lengths), 0.0) + TINY),
        layer_similarity(before, after, lengths),
        (agreeing >= 2).astype(jnp.float32),
        jnp.log(jnp.maximum(lengths.astype(jnp.float32), 1.0)),
        transcript_change(tokens, previous_tokens),
        jnp.log(mean_label_probability(logits, lengths) + TINY),
    )
    return jnp.stack(columns, axis=-1)


def all_exit_features(
    embedded: Frames, hidden: Sequence[Frames], exit_logits: Sequence[Logits], lengths: Lengths
) -> Float[Array, "e b f"]:
    """The features of every exit, from a pass through the whole model; arguments as of `all_exit_scores`."""
    tokens = jnp.zeros(embedded.shape[:2], jnp.int32)
    agreeing = jnp.zeros(lengths.shape, jnp.int32)
    features = []
    for before, after, logits in zip((embedded, *hidden), hidden, exit_logits, strict=False):
        previous_tokens, tokens = tokens, greedy_tokens(logits, lengths)
        agreeing = exits_agreeing(tokens, previous_tokens, agreeing)
        features.append(
            exit_features(before, after, logits, lengths, tokens, previous_tokens, agreeing)
        )
    return jnp.stack(features)


def leave_probability(
    weights: Float[Array, "f"], bias: Float[Array, ""], features: Float[Array, "... f"]
) -> Float[Array, "..."]:
    """`sigmoid(w . x + b)` of one exit."""
    return jax.nn.sigmoid(features @ weights + bias)


def exit_probabilities(predictor: ExitPredictor, features: np.ndarray) -> np.ndarray:
    """P of every exit, `[e u f] -> [e u]`; 1 at the last exit."""
    rows = [
        leave_probability(jnp.asarray(w, jnp.float32), jnp.float32(b), x)
        for w, b, x in zip(predictor.weights, predictor.bias, features, strict=False)
    ]
    return np.stack([*map(np.asarray, rows), np.ones(features.shape[1], np.float32)])


def nothing_to_gain(errors: np.ndarray) -> Bool[np.ndarray, "e-1 u"]:
    """`errors_m <= min_{k>m} errors_k`, from word errors `[e u]`."""
    best_later = np.minimum.accumulate(errors[::-1], axis=0)[::-1][1:]
    return errors[:-1] <= best_later


def fit_exit_predictor(
    features: np.ndarray, errors: np.ndarray, penalty: float = 1.0
) -> ExitPredictor:
    """The regressions: for every exit but the last the minimum of a convex function, by Newton's method in float64.

        sum_u log(1 + exp(s_u)) - y_u s_u + penalty / 2 (|v|^2 + c^2),    s_u = v . (x_u - mean) / std + c

    y is `nothing_to_gain`; the penalty keeps v and c finite where the classes can be parted. The result is in the
    units of x.

    Args:
        features: `[e u f]`, from `exit_features`, of a dev set.
        errors: `[e u]`, its word errors.
        penalty: above 0.

    Raises:
        InputError: there is one exit alone or no utterance, features and errors do not go together or are not finite,
            or the penalty is not above 0.
    """
    features, errors = np.asarray(features, np.float64), np.asarray(errors)
    if features.ndim != 3 or features.shape[:2] != errors.shape or min(errors.shape) < 1:
        raise InputError(
            f"features are of shape {features.shape} and errors {errors.shape}: give [e u f] and [e u]"
        )
    if len(errors) < 2:
        raise InputError("a model of one exit has nothing to predict: give at least 2 exits")
    if not np.isfinite(features).all():
        raise InputError("features are not finite: score the dev set with a model that is sound")
    if not penalty > 0:
        raise InputError(f"penalty is {penalty}: it must be above 0")
    rows = [
        _fit(x, y.astype(np.float64), penalty)
        for x, y in zip(features, nothing_to_gain(errors), strict=False)
    ]
    return ExitPredictor(np.stack([w for w, _ in rows]), np.array([b for _, b in rows]))


def _fit(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    mean, std = x.mean(axis=0), x.std(axis=0)
    std = np.where(std > 0, std, 1.0)
    z = np.concatenate([(x - mean) / std, np.ones((len(x), 1))], axis=1)

    def objective(v):
        s = z @ v
        return np.sum(np.logaddexp(0.0, s) - y * s) + penalty / 2 * v @ v

    v = np.zeros(z.shape[1])
    for _ in range(MOST_STEPS):
        p = 1.0 / (1.0 + np.exp(-(z @ v)))
        gradient = z.T @ (p - y) + penalty * v
        hessian = (z.T * (p * (1.0 - p))) @ z + penalty * np.eye(len(v))
        step = np.linalg.solve(hessian, gradient)
        # Halved until it goes down, for the first steps; at the minimum nothing goes down any more.
        while objective(v - step) > objective(v) and np.abs(step).max() > 1e-12:
            step = step / 2
        v = v - step
        if np.abs(step).max() < 1e-10:
            break
    weights = v[:-1] / std
    return weights, float(v[-1] - weights @ mean)


def save_predictor(folder: str | Path, predictor: ExitPredictor) -> None:
    """Writes `exit_predictor.json` into a model's folder."""
    content = {
        "format": FORMAT,
        "features": list(FEATURES),
        "weights": predictor.weights.tolist(),
        "bias": predictor.bias.tolist(),
    }
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(Path(folder) / FILE_NAME, lambda file: file.write(text.encode()))


def load_predictor(folder: str | Path) -> ExitPredictor:
    """Reads what `save_predictor` wrote; a feature that an older file does not know has weight 0.

    Raises:
        InputError: the file is missing or damaged, or is about other features.
    """
    path = Path(folder) / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = content["features"]
        if content["format"] != FORMAT or not set(names) <= set(FEATURES):
            raise ValueError(f"format {content['format']}, features {names}")
        saved, bias = np.array(content["weights"], float), np.array(content["bias"], float)
        if saved.shape != (len(bias), len(names)):
            raise ValueError(f"weights of shape {saved.shape} for {len(bias)} exits")
        if not (np.isfinite(saved).all() and np.isfinite(bias).all()):
            raise ValueError("weights that are not finite")
        weights = np.zeros((len(bias), len(FEATURES)))
        weights[:, [FEATURES.index(name) for name in names]] = saved
        return ExitPredictor(weights, bias)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: fit a predictor and save it first") from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path} is not a saved exit predictor ({error!r}): save it again"
        ) from error
