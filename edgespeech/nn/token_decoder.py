"""A small attention decoder over an encoder's frames."""

import jax.numpy as jnp
from flax import nnx

from edgespeech.nn.decoder_layer import DecoderLayer
from edgespeech.ops.cross_entropy import token_cross_entropy
from edgespeech.ops.mask import mask_from_lengths
from edgespeech.types import Array, Float, Frames, Int, Lengths


class TokenDecoder(nnx.Module):
    """`p(y_i | y_<i, audio)`: `DecoderLayer`s between an embedding and an output layer that share their matrix.

    Args:
        vocab_size: v; token 0 stands before the first token and after the last.
        d: width, of the encoder's frames too.
        num_heads: attention heads.
        ffn_width: width of the feed-forward networks.
        num_layers: layers.
        rngs: random streams of Flax.

    Attributes:
        embedding: `[v d]`.
        layers: decoder layers, float32.
    """

    def __init__(
        self,
        vocab_size: int,
        d: int,
        num_heads: int,
        ffn_width: int,
        num_layers: int,
        *,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal(d**-0.5)
        self.embedding = nnx.Param(init(rngs.params(), (vocab_size, d)))
        self.layers = nnx.List(
            DecoderLayer(d, num_heads, ffn_width, d // num_heads, rngs=rngs)
            for _ in range(num_layers)
        )
        self.norm = nnx.LayerNorm(
            d, epsilon=1e-5, use_bias=False, use_fast_variance=False, rngs=rngs
        )

    def __call__(
        self,
        tokens: Int[Array, "b u"],
        token_lengths: Lengths,
        memory: Frames,
        memory_lengths: Lengths,
    ) -> Float[Array, "b u v"]:
        """Logits of the token after each one.

        Args:
            tokens: 0 and then the tokens so far.
            token_lengths: valid ones, the first counted.
            memory: the encoder's frames `[b n d]`, any floating dtype.
            memory_lengths: valid ones.
        """
        x = self.embedding[...][tokens]
        memory = memory.astype(jnp.float32)
        for layer in self.layers:
            x = layer(x, token_lengths, memory, memory_lengths)
        return self.norm(x) @ self.embedding[...].T

    def log_probability(
        self, tokens: Int[Array, "b u"], lengths: Lengths, memory: Frames, memory_lengths: Lengths
    ) -> Float[Array, "b"]:
        """`log p(y | audio)` of whole texts, their end counted: for training, and to compare texts that CTC proposes.

        Args:
            tokens: `[b u]`, what lies beyond a length is ignored.
            lengths: tokens of each text.
            memory: the encoder's frames `[b n d]`.
            memory_lengths: valid ones.
        """
        labels = jnp.where(mask_from_lengths(lengths, tokens.shape[1]), tokens, 0)
        labels = jnp.pad(labels, ((0, 0), (0, 1)))
        before = jnp.pad(labels[:, :-1], ((0, 0), (1, 0)))
        logits = self(before, lengths + 1, memory, memory_lengths)
        return -token_cross_entropy(logits, labels, lengths + 1)
