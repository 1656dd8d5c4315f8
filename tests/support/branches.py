"""A block with a branch run in one way and in another: outputs, gradients and running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.models.splitformer import ExitBlock
from tests.support import reference
from tests.support.tiny_exits import exit_config, exit_model

LENGTHS = np.array([7, 4, 1, 2])
OPTIONS = {
    "positions": "relative",
    "conv_norm": "group",
    "downsample": "softmax",
    "combine": "bypass",
    "layers_per_exit": 1,
}


def make_block(**changes) -> ExitBlock:
    """One with random parameters and running statistics."""
    return exit_model(**{"num_exits": 1, "layers_per_exit": 2} | changes).blocks[0]


def frames() -> np.ndarray:
    """`[b n d]` with NaN in the padding."""
    x = np.random.default_rng(2).normal(size=(4, 7, exit_config().width)).astype(np.float32)
    x[np.arange(7) >= LENGTHS[:, None]] = np.nan
    return x


def outcome(block: ExitBlock, execution: str, key=None) -> dict[str, np.ndarray]:
    """The valid output, gradients of a weighted sum of it, and the statistics afterwards, by name."""
    block.execution = execution
    graphdef, params, statistics = nnx.split(block, nnx.Param, nnx.BatchStat)
    weights = np.random.default_rng(3).normal(size=(4, 7, frames().shape[2]))

    @jax.jit
    def run(params, x):
        def loss(params, x):
            block = nnx.merge(graphdef, params, statistics, copy=True)
            y = block(x, jnp.asarray(LENGTHS), key)
            y = jnp.where(jnp.arange(7)[:, None] < LENGTHS[:, None, None], y, 0.0)
            return jnp.sum(weights * y), (y, nnx.state(block, nnx.BatchStat))

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (of_params, of_x), (y, after) = run(params, frames())
    named = reference.parameters_of_state(of_params)
    moved = reference.parameters_of_state(after)
    return {f"d {name}": value for name, value in named.items()} | moved | {"y": y, "dx": of_x}


def assert_equal_outcomes(got, want) -> None:
    """Equal up to the rounding of float32 sums in another order."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        value = np.asarray(value)
        assert np.isfinite(value).all(), name
        scale = max(1.0, np.abs(value).max())
        np.testing.assert_allclose(got[name], value, rtol=0, atol=2e-5 * scale, err_msg=name)
