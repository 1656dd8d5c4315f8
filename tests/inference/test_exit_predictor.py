"""The predictor of exits against closed forms, a gradient in plain NumPy, and the oracle."""

import json

import jax
import numpy as np
import pytest

from edgespeech.errors import InputError
from edgespeech.inference.exit_policy import ExitStatistics, chosen_exits, oracle_exits
from edgespeech.inference.exit_predictor import (
    FEATURES,
    ExitPredictor,
    exit_features,
    exit_probabilities,
    fit_exit_predictor,
    load_predictor,
    nothing_to_gain,
    save_predictor,
)

ERRORS = np.array([[4, 0, 3, 2], [2, 0, 3, 1], [1, 1, 2, 1]])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def random_dev(e=3, u=40, f=5, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(e, u, f)) * [1, 3, 0.1, 2, 1] + [0, -2, 0.9, 1, 4]
    return features, rng.integers(0, 4, size=(e, u))


def test_labels_are_where_no_deeper_exit_is_better():
    np.testing.assert_array_equal(
        nothing_to_gain(ERRORS), [[False, True, False, False], [False, True, False, True]]
    )


def test_leaving_where_it_is_true_is_the_oracle():
    _, errors = random_dev(e=5)
    certain = np.concatenate([nothing_to_gain(errors), np.ones((1, 40))])
    statistics = ExitStatistics(certain, errors, np.full(40, 5), np.arange(1.0, 6.0))
    np.testing.assert_array_equal(chosen_exits("posterior", 0.5, certain), oracle_exits(statistics))


def test_features():
    found = np.asarray(
        exit_features(
            np.array([[0.5, 0.0]]), np.array([[0.75, 1.0]]), np.array([[0.9, -1.0]]),
            np.array([[1, 2]]), np.array([50, 0]),
        )
    )  # fmt: skip
    tiny = np.log(1e-6)
    np.testing.assert_allclose(
        found[0, 0], [np.log(0.5), np.log(0.25), 0.9, 0.0, np.log(50)], rtol=1e-5
    )
    np.testing.assert_allclose(found[0, 1], [tiny, tiny, -1.0, 1.0, 0.0], rtol=1e-5)
    assert found.shape[-1] == len(FEATURES)


def test_two_groups_get_their_own_frequencies():
    """One binary feature: without a penalty the probabilities are the groups' shares, a closed form."""
    x = np.repeat([0.0, 1.0], [8, 10])
    gain = np.zeros(18, int)
    gain[:6] = 1  # 2 of 8 have nothing to gain, and 7 of 10
    gain[8:11] = 1
    features = np.zeros((2, 18, 2))
    features[0, :, 0] = x
    errors = np.stack([gain, np.zeros(18, int)])
    predictor = fit_exit_predictor(features, errors, penalty=1e-9)
    low, high = (np.log(p / (1 - p)) for p in (2 / 8, 7 / 10))
    np.testing.assert_allclose(predictor.bias, [low], atol=1e-6)
    np.testing.assert_allclose(predictor.weights, [[high - low, 0.0]], atol=1e-6)
    probabilities = exit_probabilities(predictor, features)
    np.testing.assert_allclose(probabilities[0], np.where(x, 0.7, 0.25), rtol=1e-5)
    np.testing.assert_array_equal(probabilities[1], 1.0)


@pytest.mark.parametrize("penalty", [0.3, 5.0])
def test_minimum_of_the_penalised_likelihood(penalty):
    features, errors = random_dev()
    predictor = fit_exit_predictor(features, errors, penalty)
    labels = nothing_to_gain(errors)
    for m in range(2):
        x, y = features[m], labels[m]
        mean, std = x.mean(0), x.std(0)
        v = predictor.weights[m] * std
        c = predictor.bias[m] + predictor.weights[m] @ mean
        residual = sigmoid(x @ predictor.weights[m] + predictor.bias[m]) - y
        gradient = ((x - mean) / std).T @ residual + penalty * v
        np.testing.assert_allclose(gradient, 0, atol=1e-8)
        np.testing.assert_allclose(residual.sum() + penalty * c, 0, atol=1e-8)
        assert np.abs(v).max() > 0.05


def test_classes_that_can_be_parted_stay_finite():
    features = np.zeros((2, 30, 1))
    features[0, :, 0] = np.linspace(-1, 1, 30) * 1e4
    errors = np.stack([(features[0, :, 0] < 0).astype(int), np.zeros(30, int)])
    p = exit_probabilities(fit_exit_predictor(features, errors, 0.01), features)[0]
    assert np.isfinite(p).all()
    assert (p[15:] > 0.5).all()
    assert (p[:15] < 0.5).all()


def test_probabilities_on_the_device_equal_numpy():
    features, errors = random_dev()
    predictor = fit_exit_predictor(features, errors)
    found = jax.jit(exit_features)(*np.float32([1.5, 0.6, 0.8, 2, 30]))
    expected = [np.log(1.5), np.log(0.4), 0.8, 1.0, np.log(30)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    probabilities = exit_probabilities(predictor, np.float32(features))
    for m in range(2):
        plain = sigmoid(features[m] @ predictor.weights[m] + predictor.bias[m])
        np.testing.assert_allclose(probabilities[m], plain, rtol=1e-4)


def test_round_trip_is_exact(tmp_path):
    predictor = fit_exit_predictor(*random_dev())
    save_predictor(tmp_path, predictor)
    found = load_predictor(tmp_path)
    np.testing.assert_array_equal(found.weights, predictor.weights)
    np.testing.assert_array_equal(found.bias, predictor.bias)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(InputError, match=r"exit_predictor.json is missing"):
        load_predictor(tmp_path)
    save_predictor(tmp_path, ExitPredictor(np.zeros((2, 5)), np.zeros(2)))
    path = tmp_path / "exit_predictor.json"
    content = json.loads(path.read_text())
    for damage in ({"features": ["luck"]}, {"format": 2}, {"bias": [0.0]}, {"weights": "x"}):
        path.write_text(json.dumps(content | damage))
        with pytest.raises(InputError, match="not a saved exit predictor"):
            load_predictor(tmp_path)


@pytest.mark.parametrize(
    ("features", "errors", "penalty", "message"),
    [
        (np.zeros((2, 3, 4)), np.zeros((2, 4)), 1.0, r"shape \(2, 3, 4\) and errors \(2, 4\)"),
        (np.zeros((1, 3, 4)), np.zeros((1, 3)), 1.0, "a model of one exit"),
        (np.full((2, 3, 4), np.nan), np.zeros((2, 3)), 1.0, "not finite"),
        (np.zeros((2, 3, 4)), np.zeros((2, 3)), 0.0, "penalty is 0.0"),
    ],
)
def test_what_cannot_be_fitted(features, errors, penalty, message):
    with pytest.raises(InputError, match=message):
        fit_exit_predictor(features, errors, penalty)
