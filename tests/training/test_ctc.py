"""The teacher's objective: CTC of each utterance per token, averaged over real rows, at several layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.training.ctc import ctc_objective, ctc_per_token, head_objective, weighted_mean
from tests.support.tiny import batch_with_filler, tiny_model, tone_source


def plain_ctc(logits, target):
    """`-log sum over alignments` by the forward recursion of Graves et al. (2006), in probabilities, float64."""
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    labels = [0]
    for token in target:
        labels += [int(token), 0]
    alpha = np.zeros(len(labels))
    alpha[:2] = p[0, labels[:2]]
    for frame in p[1:]:
        previous, alpha = alpha, np.zeros(len(labels))
        for s, label in enumerate(labels):
            alpha[s] = previous[s] + (previous[s - 1] if s else 0)
            if s > 1 and label not in (0, labels[s - 2]):
                alpha[s] += previous[s - 2]
            alpha[s] *= frame[label]
    return -np.log(alpha[-2:].sum())


@pytest.fixture(scope="module")
def case():
    """A model, a batch with filler rows, and the model's output on it."""
    model = tiny_model(dropout=0.0)
    batch = batch_with_filler(tone_source())
    assert 0 < batch.weights.sum() < len(batch.weights)
    return model, batch, model(batch.audio, batch.audio_lengths)


def plain_objective(logits, lengths, batch):
    losses = [
        plain_ctc(logits[row, : int(lengths[row])], batch.targets[row, : batch.target_lengths[row]])
        / batch.target_lengths[row]
        for row in np.flatnonzero(batch.weights)
    ]
    return np.mean(losses)


def test_weighted_mean():
    values, weights = jnp.asarray([3.0, 5.0, 100.0]), jnp.asarray([1.0, 1.0, 0.0])
    assert float(weighted_mean(values, weights)) == 4.0
    assert float(weighted_mean(values, jnp.zeros(3))) == 0.0


def test_loss_of_each_utterance_per_token(case):
    _, batch, output = case
    found = ctc_per_token(output.logits, output.lengths, batch)
    for row in np.flatnonzero(batch.weights):
        length, tokens = int(output.lengths[row]), int(batch.target_lengths[row])
        target = batch.targets[row, :tokens]
        expected = plain_ctc(output.logits[row, :length], target) / tokens
        np.testing.assert_allclose(found[row], expected, rtol=1e-5)


def test_objective_is_the_last_layer_alone(case):
    model, batch, output = case
    graphdef, params = nnx.split(model)
    # Without a key there is neither dropout nor SpecAugment.
    loss, metrics = jax.jit(ctc_objective(graphdef))(params, batch, None, 0)
    expected = plain_objective(output.logits, output.lengths, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics.keys() == {"ctc"}


def test_objective_with_intermediate_layers(case):
    model, batch, output = case
    graphdef, params = nnx.split(model)
    objective = ctc_objective(graphdef, (1, 2), 0.25)
    loss, metrics = jax.jit(objective)(params, batch, None, 0)
    last = plain_objective(output.logits, output.lengths, batch)
    middle = np.mean(
        [
            plain_objective(
                model.logits(output.hidden[layer - 1], output.lengths), output.lengths, batch
            )
            for layer in (1, 2)
        ]
    )
    np.testing.assert_allclose(metrics["ctc"], last, rtol=1e-5)
    np.testing.assert_allclose(metrics["ctc_intermediate"], middle, rtol=1e-5)
    np.testing.assert_allclose(loss, 0.75 * last + 0.25 * middle, rtol=1e-5)


def test_filler_rows_and_padding_count_nowhere(case):
    model, batch, _ = case
    graphdef, params = nnx.split(model)
    value_and_grad = jax.jit(jax.value_and_grad(ctc_objective(graphdef, (1,)), has_aux=True))
    (loss, _), gradient = value_and_grad(params, batch, None, 0)
    audio, targets = batch.audio.copy(), batch.targets.copy()
    for row, weight in enumerate(batch.weights):
        audio[row, batch.audio_lengths[row] :] = 0.7
        targets[row, batch.target_lengths[row] :] = 3
        if weight == 0:
            audio[row] = np.random.default_rng(row).normal(size=audio.shape[1])
    (same, _), same_gradient = value_and_grad(
        params, batch._replace(audio=audio, targets=targets), None, 0
    )
    np.testing.assert_allclose(same, loss, rtol=1e-6)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest),
        gradient,
        same_gradient,
    )


def test_dropout_depends_on_the_key_alone(case):
    model, batch, _ = case
    dropping = tiny_model(dropout=0.3)
    nnx.update(dropping, nnx.state(model))
    graphdef, params = nnx.split(dropping)
    loss = jax.jit(ctc_objective(graphdef))
    first, again, other = (
        float(loss(params, batch, jax.random.key(seed), 0)[0]) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_head_objective(case):
    """The loss of the last layer, whose gradient reaches the head alone and is there that of the whole objective."""
    model, batch, output = case
    head, objective, prepare = head_objective(model)
    heard = prepare(batch)
    # What frames of the padding hold has no meaning; the other call is not compiled, and rounds otherwise.
    lengths = np.where(batch.weights > 0, output.lengths, 0)
    valid = np.arange(heard.hidden.shape[1]) < lengths[:, None]
    found, want = (np.asarray(hidden)[valid] for hidden in (heard.hidden, output.hidden[-1]))
    np.testing.assert_allclose(found, want, atol=2e-5)
    (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(head, heard, None, 0)
    expected = plain_objective(output.logits, output.lengths, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics.keys() == {"ctc"}
    graphdef, params = nnx.split(model)
    whole, _ = jax.grad(ctc_objective(graphdef), has_aux=True)(params, batch, None, 0)
    assert set(gradient) == {"head"}
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(
            gradient["head"][name][...], whole["head"][name][...], rtol=1e-4, atol=1e-6
        )
