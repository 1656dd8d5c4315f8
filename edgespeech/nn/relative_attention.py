"""Sinusoidal positions, and self-attention that sees them as offsets between frames."""

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.ops.attention import MASKED
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Float, Frames, Lengths


def sinusoids(positions: Float[Array, "n"], d: int) -> Float[Array, "n d"]:
    """`sin(p w_k)` in the even and `cos(p w_k)` in the odd channels, `w_k = 10000^(-2k/d)` (Vaswani et al., 2017).

    Args:
        positions: frame numbers or offsets; may be negative.
        d: channels, even.
    """
    frequencies = jnp.exp(jnp.arange(0, d, 2) * (-jnp.log(10000.0) / d))
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(-1, d)


class RelativeSelfAttention(nnx.Module):
    """Multi-head self-attention with relative positions (Dai et al., 2019, Transformer-XL; Conformer, section 2.1).

        s_ij = ((q_i + u) . k_j + (q_i + v) . W_R r_{i-j}) / sqrt(c),    y_i = sum_j softmax_j(s_ij) v_j

    r is the sinusoid of the offset; u and v stand in for a query of content and of position.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: linear layers `d -> d` with bias.
        position_proj: W_R, `d -> d` without bias.
        content_bias, position_bias: u and v, `[h c]`.
        num_heads: heads h.

    Raises:
        InputError: num_heads does not divide the width, or the width is odd.
    """

    def __init__(self, d: int, num_heads: int, *, rngs: nnx.Rngs):
        if d % num_heads or d % 2:
            raise InputError(
                f"RelativeSelfAttention width {d} must be even and a multiple of num_heads {num_heads}: change either"
            )
        self.num_heads = num_heads
        self.q_proj = nnx.Linear(d, d, rngs=rngs)
        self.k_proj = nnx.Linear(d, d, rngs=rngs)
        self.v_proj = nnx.Linear(d, d, rngs=rngs)
        self.out_proj = nnx.Linear(d, d, rngs=rngs)
        self.position_proj = nnx.Linear(d, d, use_bias=False, rngs=rngs)
        self.content_bias = nnx.Param(jnp.zeros((num_heads, d // num_heads)))
        self.position_bias = nnx.Param(jnp.zeros((num_heads, d // num_heads)))

    def __call__(self, x: Frames, lengths: Lengths) -> Frames:
        """`[b n d], [b] -> [b n d]`; what lies beyond a length is never seen."""
        b, n, d = x.shape
        h, c = self.num_heads, d // self.num_heads
        mask = mask_from_lengths(lengths, n)
        x = zero_padding(x, mask)
        q, k, v = (proj(x).reshape(b, n, h, c) for proj in (self.q_proj, self.k_proj, self.v_proj))
        # One row for each offset -(n-1) .. n-1; s_ij picks row i - j + n - 1.
        offsets = jnp.arange(-(n - 1), n)
        r = self.position_proj(sinusoids(offsets, d)).reshape(2 * n - 1, h, c)
        content = jnp.einsum("bihc,bjhc->bhij", q + self.content_bias[...], k)
        position = jnp.einsum("bihc,ohc->bhio", q + self.position_bias[...], r)
        row = jnp.arange(n)[:, None] - jnp.arange(n)[None, :] + n - 1
        position = jnp.take_along_axis(position, row[None, None], axis=-1)
        scores = (content + position).astype(jnp.float32) * c**-0.5
        scores = jnp.where(mask[:, None, None, :], scores, MASKED)
        y = jnp.einsum("bhij,bjhc->bihc", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
        return self.out_proj(y.reshape(b, n, d))
