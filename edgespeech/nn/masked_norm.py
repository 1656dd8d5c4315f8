"""Batch, group and layer norm over the valid frames of padded sequences."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.ops.mask import masked_mean
from edgespeech.types import Frames, Mask

NormKind = Literal["batch", "group", "layer"]

# The axes of `[b n d]` that share one mean and one variance.
STATISTICS_AXES = {"batch": (0, 1), "group": (1, 2), "layer": (2,)}
EPSILON = 1e-5
MOMENTUM = 0.1


class MaskedNorm(nnx.Module):
    """`y = (x - mean) / sqrt(variance + 1e-5) * scale + bias`, with statistics of valid frames alone.

    What differs is over what the mean and the (biased) variance are taken:

        batch: all valid frames of the batch, for every channel (Ioffe and Szegedy, 2015)
        group: all valid frames and channels of one utterance: one group (Wu and He, 2018)
        layer: the channels of one frame (Ba et al., 2016)

    In training, `batch` uses the batch's own statistics and moves the running ones towards them,
    `r <- 0.9 r + 0.1 s`, s being the mean and the unbiased variance; in inference it uses the running ones, so an
    utterance's output does not depend on its batch. `group` and `layer` are the same in both.

    Attributes:
        scale, bias: `[d]`.
        running_mean, running_variance: `[d]`, `nnx.BatchStat`, of `batch` alone. Whoever trains a functional copy of
            the module must carry them on: they change in the call and have no gradient.

    Raises:
        InputError: the kind is none of the three.
    """

    def __init__(self, d: int, kind: NormKind):
        if kind not in get_args(NormKind):
            raise InputError(f"norm is {kind!r}: choose {', '.join(get_args(NormKind))}")
        self.kind = kind
        self.scale = nnx.Param(jnp.ones(d))
        self.bias = nnx.Param(jnp.zeros(d))
        if kind == "batch":
            self.running_mean = nnx.BatchStat(jnp.zeros(d))
            self.running_variance = nnx.BatchStat(jnp.ones(d))

    def __call__(self, x: Frames, mask: Mask, training: bool = False) -> Frames:
        """`[b n d], [b n] -> [b n d]`; statistics in float32. What lies outside the mask is not cleared."""
        if self.kind == "batch" and not training:
            mean, variance = self.running_mean[...], self.running_variance[...]
        else:
            axes = STATISTICS_AXES[self.kind]
            mean = masked_mean(x, mask[..., None], axes)
            variance = masked_mean(jnp.square(x - mean), mask[..., None], axes)
            if self.kind == "batch":
                self._update_running(mean[0, 0], variance[0, 0], jnp.sum(mask))
        y = (x - mean) * jax.lax.rsqrt(variance + EPSILON) * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)

    def _update_running(self, mean: jax.Array, variance: jax.Array, count: jax.Array) -> None:
        unbiased = variance * count / jnp.maximum(count - 1, 1)
        # A batch of filler rows alone says nothing.
        rate = jnp.where(count > 0, MOMENTUM, 0.0)
        for running, batch in ((self.running_mean, mean), (self.running_variance, unbiased)):
            running[...] = (1 - rate) * running[...] + rate * jax.lax.stop_gradient(batch)
