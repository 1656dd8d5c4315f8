"""Gradients against finite differences of a float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np


def numeric_derivative(function, arrays, direction, eps=1e-6):
    """Directional derivative of a float64 function by central differences."""
    ends = [
        function(*(a + s * eps * d for a, d in zip(arrays, direction, strict=True)))
        for s in (1, -1)
    ]
    return (ends[0] - ends[1]) / (2 * eps)


def assert_gradient(fast, slow, arrays, seed=5, tol=2e-5):
    """Gradient of `sum(w * fast)` along a random direction against finite differences of slow.

    The difference is at most `tol` of the gradients' norms, or of 1 where they are smaller.
    """
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=slow(*arrays).shape)
    direction = [rng.normal(size=a.shape) for a in arrays]
    loss = jax.jit(jax.grad(lambda a: jnp.sum(np.float32(weight) * fast(*a))))
    grads = loss([np.float32(a) for a in arrays])
    got = sum(np.sum(np.float64(g) * d) for g, d in zip(grads, direction, strict=True))
    want = numeric_derivative(lambda *a: np.sum(weight * slow(*a)), arrays, direction)
    scale = sum(np.linalg.norm(g) for g in grads)
    assert abs(got - want) < tol * max(1.0, scale)
