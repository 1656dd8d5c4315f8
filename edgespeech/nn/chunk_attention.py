"""Self-attention over chunks of frames: a bounded past, and a look-ahead that does not grow with depth."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from edgespeech.errors import InputError
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.causal_conv import carry_over, whole_chunks
from edgespeech.nn.rotary import KeysValues
from edgespeech.ops.attention import attention
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.ops.rotary import rotate
from edgespeech.types import Array, Bool, Float, Frames, Int, Lengths


class Chunks(NamedTuple):
    """What a frame sees: its own chunk and some before it.

    Attributes:
        size: frames of a chunk, at least 1.
        left: chunks before its own, at least 0.
    """

    size: int | Int[Array, ""]
    left: int | Int[Array, ""]


# One chunk that no utterance fills: everything sees everything.
FULL_CONTEXT = Chunks(2**30, 0)


def chunk_mask(
    queries: Int[Array, "n"], keys: Int[Array, "m"], chunks: Chunks
) -> Bool[Array, "n m"]:
    """True where `chunk(i) - left <= chunk(j) <= chunk(i)`, `chunk(i) = floor(i / size)`, query i and key j.

    Nothing is seen beyond the end of a query's own chunk, and what is seen there was computed with the same limit: the
    look-ahead of many layers is that of one.

    Args:
        queries: their frame numbers; number 0 starts a chunk.
        keys: theirs, negative for frames before.
        chunks: may be traced.
    """
    i, j = queries[:, None] // chunks.size, keys[None, :] // chunks.size
    return (i - chunks.left <= j) & (j <= i)


class AttentionState(NamedTuple):
    """What the next chunk sees of the past.

    Attributes:
        past: keys, without positions, and values of the last `left` chunks, the latest at the end.
        seen: `[b]` int32, how many of these frames there are.
    """

    past: KeysValues
    seen: Lengths


class ChunkAttention(SelfAttention):
    """Self-attention limited by `chunk_mask`, whole or in steps, with rotary positions (arXiv 2104.09864).

        y_i = W_O [ sum_j softmax_j(R_i q_i . R_j k_j / sqrt(c)) v_j ]_heads,   chunk(i) - left <= chunk(j) <= chunk(i)

    Chunk-wise attention is from arXiv 2312.10359 (known second-hand); rotary positions are our choice: they depend on
    the distance alone, so that a stream may go on for ever.

    Args:
        d: width.
        num_heads: heads h; d / h must be even.
        chunk: frames of a chunk.
        left: chunks that are seen before a frame's own.
        rngs: random streams of Flax.
        dtype: of the computation; None: that of the input. Softmax is in float32.

    Attributes:
        q_proj, k_proj, v_proj, out_proj, num_heads: as in `SelfAttention`.
        chunk, left: as above; may be changed, as the parameters do not depend on them.
        stride, latency, receptive_field: of the stream, in frames: see `StreamingConvolution`.

    Raises:
        InputError: a size is out of range.
    """

    stride = 1

    def __init__(
        self,
        d: int,
        num_heads: int,
        *,
        chunk: int,
        left: int,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
    ):
        super().__init__(d, num_heads, rngs=rngs, dtype=dtype)
        if (d // num_heads) % 2:
            raise InputError(
                f"ChunkAttention has {d // num_heads} channels a head: rotary positions need an even number; "
                "change width or num_heads"
            )
        if chunk < 1 or left < 0:
            raise InputError(
                f"ChunkAttention chunk is {chunk} and left {left}: they must be at least 1 and at least 0"
            )
        self.chunk = chunk
        self.left = left

    @property
    def latency(self) -> int:
        """Frames: the first of a chunk waits for its last."""
        return self.chunk - 1

    @property
    def receptive_field(self) -> tuple[int, int]:
        """Frames before the last of a chunk, and after its first."""
        return (self.left + 1) * self.chunk - 1, self.chunk - 1

    def __call__(self, x: Frames, lengths: Lengths, chunks: Chunks | None = None) -> Frames:
        """`[b n d], [b] -> [b n d]`; what lies beyond a length is never seen.

        Args:
            x: frame 0 starts a chunk.
            lengths: valid frames.
            chunks: in place of the attributes; may be traced.
        """
        n = x.shape[1]
        mask = mask_from_lengths(lengths, n)
        q, new = self._project(zero_padding(x, mask))
        positions = jnp.arange(n)
        chunks = Chunks(self.chunk, self.left) if chunks is None else chunks
        visible = chunk_mask(positions, positions, chunks) & mask[:, None, None, :]
        return self._seen_from(q, positions, new, positions, visible)

    def init_state(self, batch: int) -> AttentionState:
        """No past yet, for so many streams."""
        d, _ = self.k_proj.kernel.shape
        shape = (batch, self.left * self.chunk, self.num_heads, d // self.num_heads)
        nothing = jnp.zeros(shape, self.k_proj.dtype or self.k_proj.kernel.dtype)
        return AttentionState(KeysValues(nothing, nothing), jnp.zeros(batch, jnp.int32))

    def step(
        self, chunk: Frames, lengths: Lengths, state: AttentionState
    ) -> tuple[Frames, Lengths, AttentionState]:
        """The next frames of every stream, `[b c d], [b] -> [b c d], [b]`, and the state after them.

        Raises:
            InputError: c is not a multiple of the attribute `chunk`.
        """
        c = chunk.shape[1]
        whole_chunks("ChunkAttention", c, self.chunk)
        size = self.left * self.chunk
        mask = mask_from_lengths(lengths, c)
        q, new = self._project(zero_padding(chunk, mask))
        joined = KeysValues(
            *(jnp.concatenate(pair, axis=1) for pair in zip(state.past, new, strict=True))
        )
        # Counted from this chunk: the angles of rotary positions never grow large.
        queries, keys = jnp.arange(c), jnp.arange(-size, c)
        there = (-state.seen[:, None] <= keys) & (keys < lengths[:, None])
        visible = chunk_mask(queries, keys, Chunks(self.chunk, self.left)) & there[:, None, None, :]
        y = self._seen_from(q, queries, joined, keys, visible)
        past = KeysValues(*(carry_over(part, lengths, size) for part in joined))
        return y, lengths, AttentionState(past, jnp.minimum(state.seen + lengths, size))

    def _project(self, x: Frames) -> tuple[Float[Array, "b n h c"], KeysValues]:
        q, k, v = (
            proj(x).reshape(*x.shape[:2], self.num_heads, -1)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, KeysValues(k, v)

    def _seen_from(
        self,
        q: Float[Array, "b n h c"],
        queries: Int[Array, "n"],
        memory: KeysValues,
        keys: Int[Array, "m"],
        visible: Bool[Array, "b 1 n m"],
    ) -> Frames:
        """What queries at these frame numbers see of keys at those."""
        c = q.shape[-1]
        q, k = rotate(q, queries, c), rotate(memory.keys, keys, c)
        y = attention(q, k, memory.values, visible)
        return self.out_proj(y.reshape(*q.shape[:2], -1))
