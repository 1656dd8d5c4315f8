"""Windows around every frame, read by content: the part of an LPA whose pulses move with the frame that reads them."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from edgespeech.ops.relative import relative_average, window_spans
from edgespeech.types import Array, Float, Frames, Mask


class RelativeWindows(nnx.Module):
    """`y_t = sum_k w_tk sum_(j in window k of t) v_j`, the weights a softmax of linear scores of z_t (ours).

    Windows and softmax are those of `ops.relative.relative_average`. At first a window's score is the logarithm of one
    over its distance, whatever is heard, and small random weights tell contents apart.

    Attributes:
        kernel: `[d h k]`, from z to the scores.
        bias: `[h k]`.
        taps, octaves: see `window_spans`.
    """

    def __init__(
        self,
        d: int,
        num_heads: int,
        taps: int,
        octaves: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.taps, self.octaves = taps, octaves
        near = np.abs(window_spans(taps, octaves)).min(axis=1)
        bias = np.tile(-np.log1p(near), (num_heads, 1))
        init = nnx.initializers.normal(0.2 * d**-0.5)
        self.kernel = nnx.Param(init(rngs.params(), (d, *bias.shape), param_dtype))
        self.bias = nnx.Param(jnp.asarray(bias, param_dtype))

    def __call__(self, z: Frames, v: Frames, mask: Mask) -> Float[Array, "b n h c"]:
        """What frames z gather from the values v, `[b n d], [b n d] -> [b n h c]`, float32."""
        d, h, k = self.kernel.shape
        kernel = self.kernel[...].astype(z.dtype).reshape(d, h * k)
        scores = (z @ kernel).reshape(*z.shape[:2], h, k).astype(jnp.float32)
        scores = scores + self.bias[...].astype(jnp.float32)
        heads = v.reshape(*v.shape[:2], h, -1)
        return relative_average(heads, scores, mask, self.taps, self.octaves)
