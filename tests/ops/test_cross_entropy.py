"""Cross-entropy of tokens against a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from edgespeech.ops.cross_entropy import token_cross_entropy

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 4, 6)) * 3
LABELS = RNG.integers(0, 6, (3, 4))
LENGTHS = np.array([4, 2, 0])


def test_is_the_sum_of_negative_log_probabilities():
    wanted = [
        -sum(
            LOGITS[row, i, LABELS[row, i]] - np.log(np.exp(LOGITS[row, i]).sum())
            for i in range(length)
        )
        for row, length in enumerate(LENGTHS)
    ]
    found = token_cross_entropy(jnp.float32(LOGITS), jnp.array(LABELS), jnp.array(LENGTHS))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_padding_has_no_part_in_it():
    is_valid = np.arange(4) < LENGTHS[:, None]
    logits = np.where(is_valid[..., None], LOGITS, np.nan).astype(np.float32)
    labels = np.where(is_valid, LABELS, -100)

    def loss(logits, labels):
        return jnp.sum(token_cross_entropy(logits, jnp.asarray(labels), jnp.array(LENGTHS)))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits), labels)
    clean, clean_gradient = jax.value_and_grad(loss)(jnp.float32(LOGITS), LABELS)
    assert float(value) == float(clean)
    np.testing.assert_array_equal(gradient, clean_gradient)
    assert not np.asarray(gradient)[~is_valid].any()
    # softmax minus the label's one
    probabilities = np.exp(LOGITS[0]) / np.exp(LOGITS[0]).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient[0], probabilities - np.eye(6)[LABELS[0]], atol=1e-6)
