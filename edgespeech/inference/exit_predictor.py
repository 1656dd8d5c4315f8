"""Will going deeper pay? Logistic regression on what an exit knows of itself, fitted on a dev set (ours).

    p_m = sigmoid(w_m . x_m + b_m)      the probability that no deeper exit has fewer word errors than exit m

The oracle leaves at the first exit of which that is true; the rule `calibrated` at the first one whose p_m is at or
above a threshold. The features x cost a few sums over frames and the regression a dot product, so the rule stays on
the device.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from edgespeech.data.corpus import write_atomically
from edgespeech.errors import InputError
from edgespeech.types import Array, Bool, Float

FORMAT = 1
FILE_NAME = "exit_predictor.json"
FEATURES = ("log_entropy", "log_doubt", "similarity", "agrees", "log_frames")
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


def exit_features(entropy, max_probability, similarity, agreeing, frames) -> Float[Array, "... f"]:
    """The features of an exit, in the order of `FEATURES`, from scores of `exit_criteria`; on the device or off it.

    Entropy, `1 - max_probability` and length are logarithms: their sums are logarithms of totals over an utterance.

    Args:
        entropy: `[...]`, nats per frame.
        max_probability: `[...]`, in [0, 1].
        similarity: `[...]`, a cosine.
        agreeing: `[...]`, the score of the rule `patience`; the feature is 1 where it is 2 or more.
        frames: valid frames; of a shape that goes with the others.
    """
    columns = (
        jnp.log(jnp.asarray(entropy) + TINY),
        jnp.log(jnp.maximum(1.0 - jnp.asarray(max_probability), 0.0) + TINY),
        jnp.asarray(similarity),
        (jnp.asarray(agreeing) >= 2).astype(jnp.float32),
        jnp.log(jnp.maximum(jnp.asarray(frames, jnp.float32), 1.0)),
    )
    return jnp.stack(jnp.broadcast_arrays(*columns), axis=-1)


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
    """Reads what `save_predictor` wrote.

    Raises:
        InputError: the file is missing or damaged, or is about other features.
    """
    path = Path(folder) / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["features"] != list(FEATURES):
            raise ValueError(f"format {content['format']}, features {content['features']}")
        weights, bias = np.array(content["weights"], float), np.array(content["bias"], float)
        if weights.shape != (len(bias), len(FEATURES)):
            raise ValueError(f"weights of shape {weights.shape} for {len(bias)} exits")
        return ExitPredictor(weights, bias)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: fit a predictor and save it first") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a saved exit predictor ({error!r}): save it again"
        ) from error
