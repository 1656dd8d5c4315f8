"""A transformer decoder's layer: causal self-attention, cross-attention, gated feed-forward network."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.nn.cross_attention import CrossAttention
from edgespeech.nn.remat import rematerialisable
from edgespeech.nn.rotary import KeysValues, RotarySelfAttention
from edgespeech.types import Array, Float, Frames, Int, Lengths


class LayerCache(NamedTuple):
    """What one layer keeps between tokens.

    Attributes:
        past: keys and values of the tokens so far, `[b u h c]`.
        memory: keys and values of the encoder's frames, `[b n h c]`.
    """

    past: KeysValues
    memory: KeysValues


class GatedFeedForward(nnx.Module):
    """`W_2 (a * silu(g)) + b_2` with `[a, g] = W_1 x + b_1` (Shazeer, arXiv 2002.05202, "SwiGLU", with biases).

    Attributes:
        expand: `d -> 2 width`; the second half is the gate.
        contract: `width -> d`.
    """

    def __init__(self, d: int, width: int, *, rngs: nnx.Rngs):
        self.expand = nnx.Linear(d, 2 * width, rngs=rngs)
        self.contract = nnx.Linear(width, d, rngs=rngs)

    def __call__(self, x: Frames) -> Frames:
        """`[b n d] -> [b n d]`."""
        a, gate = jnp.split(self.expand(x), 2, axis=-1)
        return self.contract(a * jax.nn.silu(gate))


class DecoderLayer(nnx.Module):
    """Layer norm first, without bias, a residual around each part, as in Moonshine (arXiv 2410.15608).

    x = x + attention(LN(x));   x = x + cross_attention(LN(x), memory);   x = x + ffn(LN(x))
    """

    def __init__(
        self, d: int, num_heads: int, ffn_width: int, rotary_width: int, *, rngs: nnx.Rngs
    ):
        def norm():
            return nnx.LayerNorm(
                d, epsilon=1e-5, use_bias=False, use_fast_variance=False, rngs=rngs
            )

        self.attention = RotarySelfAttention(d, num_heads, rotary_width, causal=True, rngs=rngs)
        self.attention_norm = norm()
        self.cross_attention = CrossAttention(d, num_heads, rngs=rngs)
        self.cross_attention_norm = norm()
        self.ffn = GatedFeedForward(d, ffn_width, rngs=rngs)
        self.ffn_norm = norm()

    @rematerialisable
    def __call__(
        self, x: Float[Array, "b u d"], lengths: Lengths, memory: Frames, memory_lengths: Lengths
    ) -> Float[Array, "b u d"]:
        """All positions at once: `[b u d]` with valid `lengths`, over `memory [b n d]` with its own."""
        x = x + self.attention(self.attention_norm(x), lengths)
        frames = self.cross_attention.keys_values(memory, memory_lengths)
        return self._after_attention(x, frames, memory_lengths)

    def init_cache(self, memory: Frames, memory_lengths: Lengths, size: int) -> LayerCache:
        """The cache before the first token, for `size` tokens."""
        return LayerCache(
            self.attention.init_cache(memory.shape[0], size),
            self.cross_attention.keys_values(memory, memory_lengths),
        )

    def step(
        self,
        x: Float[Array, "b 1 d"],
        position: Int[Array, ""],
        cache: LayerCache,
        memory_lengths: Lengths,
    ) -> tuple[Float[Array, "b 1 d"], LayerCache]:
        """One position: what `__call__` returns there, and the cache with it."""
        y, past = self.attention.step(self.attention_norm(x), position, cache.past)
        y = self._after_attention(x + y, cache.memory, memory_lengths)
        return y, cache._replace(past=past)

    def _after_attention(self, x: Array, memory: KeysValues, memory_lengths: Lengths) -> Array:
        x = x + self.cross_attention(self.cross_attention_norm(x), memory, memory_lengths)
        return x + self.ffn(self.ffn_norm(x))
