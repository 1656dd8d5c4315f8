"""The predictor of exits against closed forms, a gradient in plain NumPy, and the oracle."""

import json

import jax
import numpy as np
import pytest

from edgespeech.data.tokenizer import ctc_collapse
from edgespeech.errors import InputError
from edgespeech.inference.exit_policy import ExitStatistics, chosen_exits, oracle_exits
from edgespeech.inference.exit_predictor import (
    FEATURES,
    ExitPredictor,
    all_exit_features,
    exit_probabilities,
    fit_exit_predictor,
    load_predictor,
    nothing_to_gain,
    save_predictor,
)
from edgespeech.ops.edit_distance import edit_distance_reference

ERRORS = np.array([[4, 0, 3, 2], [2, 0, 3, 1], [1, 1, 2, 1]])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def random_dev(e=3, u=40, seed=0):
    rng = np.random.default_rng(seed)
    scale, shift = [1, 3, 0.1, 2, 1, 0.2, 1], [0, -2, 0.9, 1, 4, 0.3, -1]
    features = rng.normal(size=(e, u, len(FEATURES))) * scale + shift
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


def plain_features(before, after, logits, tokens, previous, agreeing):
    """One utterance's, frame by frame in float64."""
    p = np.exp(np.float64(logits))
    p /= p.sum(-1, keepdims=True)
    sizes = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    cosines = (before * after).sum(-1) / sizes
    change = edit_distance_reference(tokens, previous) / max(len(tokens), len(previous), 1)
    return [
        np.log(-(p * np.log(p)).sum(-1).mean()),
        np.log(1 - p.max(-1).mean()),
        np.mean(cosines),
        float(agreeing),
        np.log(len(logits)),
        change,
        np.log(1 - p[:, 0].mean()),
    ]


def test_features_of_every_exit():
    rng = np.random.default_rng(0)
    lengths, n = np.array([9, 5, 1]), 9
    h = rng.normal(size=(4, 3, n, 6))
    # The second exit says what the first does, in other probabilities; the third something else.
    logits = 2 * rng.normal(size=(3, 3, n, 4))
    logits[1] = 1.5 * logits[0]
    spoiled = [np.float32(x) for x in (*h, *logits)]
    for x in spoiled:
        x[np.arange(n) >= lengths[:, None]] = np.nan
    found = jax.jit(lambda h, z, n: all_exit_features(h[0], h[1:], z, n))(
        spoiled[:4], spoiled[4:], lengths
    )
    assert found.shape == (3, 3, len(FEATURES))
    for row, m in enumerate(lengths):
        previous, agreeing = [], False
        for exit in range(3):
            z = logits[exit, row, :m]
            tokens = ctc_collapse(z.argmax(-1))
            agreeing = exit > 0 and tokens == previous
            want = plain_features(
                h[exit, row, :m], h[exit + 1, row, :m], z, tokens, previous, agreeing
            )
            np.testing.assert_allclose(found[exit, row], want, rtol=2e-4, atol=2e-5)
            previous = tokens
    np.testing.assert_array_equal(found[1, :, FEATURES.index("agrees")], 1.0)
    assert found[2, 0, FEATURES.index("change")] > 0.2


def test_certain_and_empty_utterances_have_finite_features():
    certain = np.full((2, 3, 4), -200.0, np.float32)
    certain[..., 0] = 200.0  # blanks alone
    h = [np.ones((2, 3, 5), np.float32)] * 2
    found = all_exit_features(h[0], h[1:], [certain], np.array([3, 0]))
    tiny = np.log(1e-6)
    np.testing.assert_allclose(
        found[0], [[tiny, tiny, 1, 0, np.log(3), 0, tiny], [tiny, 0, 0, 0, 0, 0, tiny]], atol=1e-5
    )


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


def test_a_feature_that_an_older_file_lacks_has_weight_0(tmp_path):
    save_predictor(tmp_path, fit_exit_predictor(*random_dev()))
    path = tmp_path / "exit_predictor.json"
    content = json.loads(path.read_text())
    older = {"features": content["features"][:5], "weights": [w[:5] for w in content["weights"]]}
    path.write_text(json.dumps(content | older))
    found = load_predictor(tmp_path)
    np.testing.assert_array_equal(found.weights[:, :5], older["weights"])
    np.testing.assert_array_equal(found.weights[:, 5:], 0.0)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(InputError, match=r"exit_predictor.json is missing"):
        load_predictor(tmp_path)
    save_predictor(tmp_path, ExitPredictor(np.zeros((2, len(FEATURES))), np.zeros(2)))
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
