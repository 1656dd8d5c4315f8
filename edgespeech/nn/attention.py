"""Multi-head self-attention as a token mixer."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from edgespeech.errors import InputError
from edgespeech.ops.attention import attention
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Float, Frames, Lengths, Mask


class SelfAttention(nnx.Module):
    """Bidirectional self-attention, `softmax(Q K^T / sqrt(c)) V W_O` for each head (Vaswani et al., 2017).

    Attributes:
        q_proj, k_proj, v_proj, out_proj: linear layers `d -> d` with bias.
        num_heads: heads h; the width of one is `c = d / h`.

    Raises:
        InputError: num_heads does not divide the width.
    """

    def __init__(
        self,
        d: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        if d % num_heads:
            raise InputError(
                f"{type(self).__name__} width {d} is not a multiple of num_heads {num_heads}; "
                "change either one"
            )

        def linear():
            return nnx.Linear(d, d, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

        self.num_heads = num_heads
        self.q_proj = linear()
        self.k_proj = linear()
        self.v_proj = linear()
        self.out_proj = linear()

    def __call__(self, x: Frames, lengths: Lengths) -> Frames:
        """`[b n d], [b] -> [b n d]`; what lies beyond a length is never seen."""
        b, n, d = x.shape
        mask = mask_from_lengths(lengths, n)
        x = zero_padding(x, mask)
        q, k, v = (
            proj(x).reshape(b, n, self.num_heads, d // self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(self.attend(q, k, v, mask).reshape(b, n, d))

    def attend(
        self,
        q: Float[Array, "b n h c"],
        k: Float[Array, "b n h c"],
        v: Float[Array, "b n h c"],
        mask: Mask,
    ) -> Float[Array, "b n h c"]:
        """What lies between the projections."""
        return attention(q, k, v, mask[:, None, None, :])
