"""Batch, group and layer norm over the valid frames of padded sequences."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.ops.mask import masked_mean
from edgespeech.types import Array, Float, Mask

NormKind = Literal["batch", "group", "layer"]

MOMENTUM = 0.1


class MaskedNorm(nnx.Module):
    """`y = (x - mean) / sqrt(variance + epsilon) * scale + bias`, with statistics of valid frames alone.

    What differs is over what the mean and the (biased) variance are taken:

        batch: all valid frames of the batch, for every channel (Ioffe and Szegedy, 2015)
        group: all valid frames and channels of one utterance: one group (Wu and He, 2018)
        layer: the channels of one frame (Ba et al., 2016)

    What is valid or not may be a chunk of k frames as well as a frame.

    In training, `batch` uses the batch's own statistics and moves the running ones towards them,
    `r <- 0.9 r + 0.1 s`, s being the mean and the unbiased variance; in inference it uses the running ones, so an
    utterance's output does not depend on its batch. `group` and `layer` are the same in both.

    Args:
        d: channels.
        kind: see above.
        epsilon: 1e-5 as in PyTorch's norms; 1e-8 in SpeechBrain's SepFormer.

    Attributes:
        scale, bias: `[d]`.
        running_mean, running_variance: `[d]`, `nnx.BatchStat`, of `batch` alone. Whoever trains a functional copy of
            the module must carry them on: they change in the call and have no gradient.

    Raises:
        InputError: the kind is none of the three.
    """

    def __init__(self, d: int, kind: NormKind, epsilon: float = 1e-5):
        if kind not in get_args(NormKind):
            raise InputError(f"norm is {kind!r}: choose {', '.join(get_args(NormKind))}")
        self.kind = kind
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(d))
        self.bias = nnx.Param(jnp.zeros(d))
        if kind == "batch":
            self.running_mean = nnx.BatchStat(jnp.zeros(d))
            self.running_variance = nnx.BatchStat(jnp.ones(d))

    def __call__(
        self, x: Float[Array, "b n *k d"], mask: Mask, training: bool = False
    ) -> Float[Array, "b n *k d"]:
        """`[b n ... d], [b n] -> [b n ... d]`; zeros where the mask is False. Statistics are in float32."""
        valid = mask.reshape(*mask.shape, *(1,) * (x.ndim - 2))
        # Cleared at once: a NaN in the padding would reach the gradient of the scale.
        centred = jnp.where(valid, x.astype(jnp.float32), 0.0)
        if self.kind == "batch" and not training:
            mean, variance = self.running_mean[...], self.running_variance[...]
            centred = centred - mean
        else:
            mean = self._mean(centred, valid)
            centred = centred - mean
            variance = self._mean(jnp.square(centred), valid)
            if self.kind == "batch":
                self._update_running(mean.ravel(), variance.ravel(), jnp.sum(mask))
        y = centred * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...] + self.bias[...]
        return jnp.where(valid, y, 0.0).astype(x.dtype)

    def _mean(self, x: Array, valid: Array) -> Array:
        """The mean that the kind asks for, axes kept."""
        if self.kind == "batch":
            return masked_mean(x, valid, tuple(range(x.ndim - 1)))
        if self.kind == "layer":
            return jnp.mean(x, -1, keepdims=True)
        # First within a frame or chunk: one float32 sum over a minute of chunks would lose digits.
        return masked_mean(jnp.mean(x, tuple(range(2, x.ndim)), keepdims=True), valid, 1)

    def _update_running(self, mean: jax.Array, variance: jax.Array, count: jax.Array) -> None:
        unbiased = variance * count / jnp.maximum(count - 1, 1)
        # A batch of filler rows alone says nothing.
        rate = jnp.where(count > 0, MOMENTUM, 0.0)
        for running, batch in ((self.running_mean, mean), (self.running_variance, unbiased)):
            running[...] = (1 - rate) * running[...] + rate * jax.lax.stop_gradient(batch)
