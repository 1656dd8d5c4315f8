"""Models with exits that are small enough for tests, and audio for them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.models.splitformer import Splitformer, SplitformerConfig
from tests.support.modules import randomize

SIZES = {
    "vocab_size": 5,
    "width": 8,
    "num_exits": 3,
    "layers_per_exit": 1,
    "num_heads": 2,
    "ffn_width": 12,
    "conv_kernel": 5,
    "num_mels": 10,
    "lstm_width": 3,
    "dropout": 0.0,
}
# 5, 4, 2 and 1 frames behind the paper's front end.
SAMPLES = (3520, 2880, 1600, 960)


def exit_config(**changes) -> SplitformerConfig:
    """Three exits of one layer, branches at the first and the last."""
    return dataclasses.replace(SplitformerConfig(), **(SIZES | changes))


def exit_model(seed: int = 0, scale: float = 0.3, **changes) -> Splitformer:
    """A model with random parameters and running statistics."""
    model = randomize(Splitformer(exit_config(**changes), rngs=nnx.Rngs(seed)), seed, scale)
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)):
        low, high = (-0.5, 0.5) if path[-1] == "running_mean" else (0.5, 1.5)
        variable[...] = jnp.asarray(rng.uniform(low, high, size=variable.shape), jnp.float32)
    return model


def exit_audio(samples=SAMPLES, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """float32 `[b t]` in [-1, 1] and its lengths; what is beyond a length is not zero."""
    x = 0.1 * np.random.default_rng(seed).normal(size=(len(samples), max(samples)))
    return np.float32(x), np.array(samples, np.int32)
