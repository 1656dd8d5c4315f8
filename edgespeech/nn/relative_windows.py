"""Windows around every frame, read by content: the part of an LPA whose pulses move with the frame that reads them."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from edgespeech.ops.relative import relative_average, window_spans
from edgespeech.types import Array, Float, Frames, Mask

# Of the salience: a frame counts at most e^4 = 55 times as much as another. Windows are differences of prefix sums, and
# with more the rounding of a long sum would drown windows without salient frames.
LIMIT = 2.0


class RelativeWindows(nnx.Module):
    """Windows whose scores are linear in the frame that looks, and salience in the one that is seen (ours).

        s_t = z_t W + b;   r_j = 2 tanh(z_j w / 2);   y = relative_average(v, s, r)

    At first a window's score is the logarithm of one over its distance, whatever is heard, but for small random
    weights, and all frames are equally salient.

    Attributes:
        kernel: W, `[d h k]`.
        bias: b, `[h k]`.
        salience: w, `[d h]`.
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
        self.salience = nnx.Param(jnp.zeros((d, num_heads), param_dtype))

    def __call__(self, z: Frames, v: Frames, mask: Mask) -> Float[Array, "b n h c"]:
        """What frames z gather from the values v, `[b n d], [b n d] -> [b n h c]`, float32."""
        d, h, k = self.kernel.shape
        # One product for both.
        kernel = jnp.concatenate([self.kernel[...].reshape(d, h * k), self.salience[...]], axis=1)
        scores, salience = jnp.split((z @ kernel.astype(z.dtype)).astype(jnp.float32), [h * k], -1)
        scores = scores.reshape(*z.shape[:2], h, k) + self.bias[...].astype(jnp.float32)
        salience = LIMIT * jnp.tanh(salience / LIMIT)
        heads = v.reshape(*v.shape[:2], h, -1)
        return relative_average(heads, scores, salience, mask, self.taps, self.octaves)
