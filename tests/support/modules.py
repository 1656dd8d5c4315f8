"""What the tests of modules share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def randomize(module, seed=0, scale=0.3):
    """Adds noise to every parameter, so that no scale of 1 or bias of 0 hides a term; returns it."""
    rng = np.random.default_rng(seed)
    noisy = jax.tree.map(
        lambda p: jnp.asarray((np.asarray(p) + scale * rng.normal(size=p.shape)).astype(p.dtype)),
        nnx.state(module, nnx.Param),
    )
    nnx.update(module, noisy)
    return module
