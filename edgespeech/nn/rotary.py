"""Self-attention with rotary positions: a token mixer, and the causal form with a cache for decoders."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.ops.attention import attention
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.ops.rotary import rotate
from edgespeech.types import Array, Float, Frames, Int, Lengths


class KeysValues(NamedTuple):
    """What queries attend to, by head.

    Attributes:
        keys: `[b n h c]`, with their positions where the attention has them.
        values: `[b n h c]`.
    """

    keys: Float[Array, "b n h c"]
    values: Float[Array, "b n h c"]


class RotarySelfAttention(nnx.Module):
    """Self-attention without biases whose queries and keys are turned by their positions (arXiv 2104.09864).

        y_i = W_O [ sum_j softmax_j(R_i q_i . R_j k_j / sqrt(c)) v_j ]_heads,   j <= i where causal

    Attributes:
        q_proj, k_proj, v_proj, out_proj: linear layers `d -> d`.
        num_heads: heads h; the width of one is `c = d / h`.
        rotary_width: channels of a head that are turned; the others carry no position.
        causal: whether a position sees only itself and what is before it.

    Raises:
        InputError: num_heads does not divide the width, or rotary_width is not an even number of a head's channels.
    """

    def __init__(
        self, d: int, num_heads: int, rotary_width: int, *, causal: bool = False, rngs: nnx.Rngs
    ):
        if d % num_heads:
            raise InputError(
                f"RotarySelfAttention width {d} is not a multiple of num_heads {num_heads}; "
                "change either one"
            )
        if rotary_width % 2 or not 0 < rotary_width <= d // num_heads:
            raise InputError(
                f"RotarySelfAttention rotary_width is {rotary_width}; it must be even and from 2 to the "
                f"{d // num_heads} channels of a head"
            )

        def linear():
            return nnx.Linear(d, d, use_bias=False, rngs=rngs)

        self.num_heads = num_heads
        self.rotary_width = rotary_width
        self.causal = causal
        self.q_proj = linear()
        self.k_proj = linear()
        self.v_proj = linear()
        self.out_proj = linear()

    def _project(
        self, x: Frames, positions: Int[Array, "n"]
    ) -> tuple[Float[Array, "b n h c"], KeysValues]:
        b, n, _ = x.shape
        q, k, v = (
            proj(x).reshape(b, n, self.num_heads, -1)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotate(t, positions, self.rotary_width) for t in (q, k))
        return q, KeysValues(k, v)

    def __call__(self, x: Frames, lengths: Lengths) -> Frames:
        """`[b n d], [b] -> [b n d]`; what lies beyond a length is never seen."""
        n = x.shape[1]
        mask = mask_from_lengths(lengths, n)
        q, (k, v) = self._project(zero_padding(x, mask), jnp.arange(n))
        visible = mask[:, None, None, :]
        if self.causal:
            visible = visible & jnp.tri(n, dtype=bool)
        return self.out_proj(attention(q, k, v, visible).reshape(x.shape))

    def init_cache(self, batch: int, size: int) -> KeysValues:
        """An empty cache for `step`, of so many positions, in the parameters' dtype."""
        kernel = self.k_proj.kernel[...]
        shape = (batch, size, self.num_heads, kernel.shape[1] // self.num_heads)
        return KeysValues(jnp.zeros(shape, kernel.dtype), jnp.zeros(shape, kernel.dtype))

    def step(
        self, x: Float[Array, "b 1 d"], position: Int[Array, ""], cache: KeysValues
    ) -> tuple[Float[Array, "b 1 d"], KeysValues]:
        """The causal call for one position of every row, with the keys and values of those before it.

        Args:
            x: the input at that position.
            position: from 0 to the cache's size - 1.
            cache: filled up to the position.

        Returns:
            the output, and the cache with the position filled in.
        """
        q, new = self._project(x, position[None])
        cache = jax.tree.map(
            lambda old, row: jax.lax.dynamic_update_slice_in_dim(
                old, row.astype(old.dtype), position, axis=1
            ),
            cache,
            new,
        )
        past = jnp.arange(cache.keys.shape[1]) <= position
        y = attention(q, cache.keys, cache.values, past[None, None, None])
        return self.out_proj(y.reshape(x.shape)), cache
