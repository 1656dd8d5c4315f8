"""Attention of a decoder to an encoder's frames."""

from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.rotary import KeysValues
from edgespeech.ops.attention import attention
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Float, Frames, Lengths


class CrossAttention(nnx.Module):
    """`softmax(Q K^T / sqrt(c)) V W_O`, queries from x, keys and values from another sequence (Vaswani et al., 2017).

    Without biases and without positions of its own, as in Moonshine (arXiv 2410.15608).

    Attributes:
        q_proj, k_proj, v_proj, out_proj: linear layers `d -> d`.
        num_heads: heads h; the width of one is `c = d / h`.

    Raises:
        InputError: num_heads does not divide the width.
    """

    def __init__(self, d: int, num_heads: int, *, rngs: nnx.Rngs):
        if d % num_heads:
            raise InputError(
                f"CrossAttention width {d} is not a multiple of num_heads {num_heads}; "
                "change either one"
            )

        def linear():
            return nnx.Linear(d, d, use_bias=False, rngs=rngs)

        self.num_heads = num_heads
        self.q_proj = linear()
        self.k_proj = linear()
        self.v_proj = linear()
        self.out_proj = linear()

    def keys_values(self, memory: Frames, memory_lengths: Lengths) -> KeysValues:
        """Keys and values of the frames: once an utterance, however many tokens attend to them."""
        b, n, _ = memory.shape
        memory = zero_padding(memory, mask_from_lengths(memory_lengths, n))
        k, v = (
            proj(memory).reshape(b, n, self.num_heads, -1) for proj in (self.k_proj, self.v_proj)
        )
        return KeysValues(k, v)

    def __call__(
        self, x: Float[Array, "b u d"], memory: KeysValues, memory_lengths: Lengths
    ) -> Float[Array, "b u d"]:
        """Every position of x attends to the valid frames.

        Args:
            x: the decoder's positions.
            memory: from `keys_values`.
            memory_lengths: valid frames.
        """
        b, u, _ = x.shape
        q = self.q_proj(x).reshape(b, u, self.num_heads, -1)
        mask = mask_from_lengths(memory_lengths, memory.keys.shape[1])
        y = attention(q, memory.keys, memory.values, mask[:, None, None, :])
        return self.out_proj(y.reshape(x.shape))
