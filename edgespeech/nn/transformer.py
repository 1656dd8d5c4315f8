"""The transformer encoder layer around a token mixer, and the convolutional position embedding."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.remat import rematerialisable
from edgespeech.ops.conv import depthwise_conv, grouped_conv1d
from edgespeech.ops.dropout import dropout
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Frames, Lengths

# A token mixer: `mixer(x: [b n d], lengths: [b]) -> [b n d]`.
Mixer = Callable[[Frames, Lengths], Frames]
BLOCK = 750  # frames; 500 to 1500 take the same time


class FeedForward(nnx.Module):
    """`W_2 gelu(W_1 x)`, with dropout after the activation."""

    def __init__(self, d: int, width: int, dropout_rate: float, *, rngs: nnx.Rngs):
        self.expand = nnx.Linear(d, width, rngs=rngs)
        self.contract = nnx.Linear(width, d, rngs=rngs)
        self.dropout_rate = dropout_rate

    def __call__(self, x: Frames, key: Array | None = None) -> Frames:
        """`[b n d] -> [b n d]`; dropout only when a key is given.

        Many frames go through in blocks, whose inner activations stay in the cache: 6000 frames of wav2vec2-base in 131
        ms in place of 179 (2 CPU cores, jax 0.10.2, 2026-11-20).
        """
        if key is None and x.shape[1] > 2 * BLOCK:
            return in_blocks(self._frames, x, BLOCK)
        return self._frames(x, key)

    def _frames(self, x: Frames, key: Array | None = None) -> Frames:
        y = jax.nn.gelu(self.expand(x), approximate=False)
        return self.contract(dropout(y, self.dropout_rate, key))


def in_blocks(function: Callable[[Frames], Frames], x: Frames, size: int) -> Frames:
    """A function of single frames, `[b n d] -> [b n d]`, on `size` of them at a time, one block after another."""
    b, n, d = x.shape
    count = -(-n // size)
    blocks = jnp.pad(x, ((0, 0), (0, count * size - n), (0, 0))).reshape(b, count, size, d)
    y = jax.lax.map(function, blocks.swapaxes(0, 1))
    return y.swapaxes(0, 1).reshape(b, count * size, d)[:, :n]


class EncoderLayer(nnx.Module):
    """A token mixer and a feed-forward network, each with a residual and a layer norm.

        norm_first:  x = x + mixer(LN(x));   x = x + ffn(LN(x))
        otherwise:   x = LN(x + mixer(x));   x = LN(x + ffn(x))       (wav2vec2-base)

    Attributes:
        mixer: the slot; assign any module with the mixer call to it.
    """

    def __init__(
        self,
        d: int,
        num_heads: int,
        ffn_width: int,
        *,
        norm_first: bool,
        dropout_rate: float,
        branch_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.norm_first = norm_first
        # Held as data: the slot may become a module without arrays, and the graph must not change its kind.
        self.mixer: Mixer = nnx.data(SelfAttention(d, num_heads, rngs=rngs))
        self.mixer_norm = nnx.LayerNorm(d, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.ffn = FeedForward(d, ffn_width, dropout_rate, rngs=rngs)
        self.ffn_norm = nnx.LayerNorm(d, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.dropout_rate = dropout_rate
        for branch in (self.mixer.out_proj, self.ffn.contract):
            branch.kernel[...] = branch.kernel[...] * branch_scale

    @rematerialisable
    def __call__(self, x: Frames, lengths: Lengths, key: Array | None = None) -> Frames:
        """`[b n d], [b] -> [b n d]`; dropout only when a key is given."""
        mixer_key, inner_key, ffn_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        if self.norm_first:
            y = self.mixer(self.mixer_norm(x), lengths)
            x = x + dropout(y, self.dropout_rate, mixer_key)
            y = self.ffn(self.ffn_norm(x), inner_key)
            return x + dropout(y, self.dropout_rate, ffn_key)
        y = self.mixer(x, lengths)
        x = self.mixer_norm(x + dropout(y, self.dropout_rate, mixer_key))
        y = self.ffn(x, inner_key)
        return self.ffn_norm(x + dropout(y, self.dropout_rate, ffn_key))


def run_layers(
    layers: Sequence[EncoderLayer],
    x: Frames,
    lengths: Lengths,
    keys: Sequence[Array | None],
    *,
    scan: bool,
) -> tuple[Frames, ...]:
    """The output `[b n d]` of every layer, in order.

    Args:
        layers: applied one after another.
        x: `[b n d]`.
        lengths: `[b]`.
        keys: one random key a layer for dropout, or None.
        scan: run neighbours of the same structure as one `lax.scan` over their stacked parameters. It compiles one
            layer where twelve stand (a training step of the tiny preset: 5 s instead of 20 s on 2 cores) and costs a
            copy of the parameters at each call.
    """
    outputs: list[Frames] = []
    splits = [nnx.split(layer) for layer in layers]
    start = 0
    while start < len(layers):
        graphdef = splits[start][0]
        stop = start + 1
        while scan and stop < len(layers) and splits[stop][0] == graphdef:
            stop += 1
        if stop == start + 1:
            x = layers[start](x, lengths, keys[start])
            outputs.append(x)
        else:
            states = jax.tree.map(
                lambda *leaves: jnp.stack(leaves), *(s for _, s in splits[start:stop])
            )
            stacked_keys = _stack_keys(keys[start:stop])

            def body(x, layer, graphdef=graphdef):
                state, key = layer
                y = nnx.merge(graphdef, state)(x, lengths, key)
                return y, y

            x, stacked = jax.lax.scan(body, x, (states, stacked_keys))
            outputs.extend(stacked)
        start = stop
    return tuple(outputs)


def _stack_keys(keys: Sequence[Array | None]) -> Array | None:
    given = [key for key in keys if key is not None]
    return jnp.stack(given) if given else None


class ConvPositions(nnx.Module):
    """Position embedding `gelu(conv(x) + b)`: a grouped, weight-normalised convolution over time (wav2vec 2.0).

    The kernel is `K = g V / ||V||`, with one norm for every tap over inputs and outputs, as in wav2vec2's weights.
    With as many groups as channels the kernel is depthwise.

    Attributes:
        direction: V, `[k d/groups d]`.
        gain: g, `[k 1 1]`.
        bias: `[d]`.
    """

    def __init__(self, d: int, kernel_size: int, groups: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal((4.0 / (kernel_size * d / groups)) ** 0.5)
        self.groups = groups
        self.direction = nnx.Param(init(rngs.params(), (kernel_size, d // groups, d)))
        self.gain = nnx.Param(
            jnp.sqrt(jnp.sum(jnp.square(self.direction[...]), (1, 2), keepdims=True))
        )
        self.bias = nnx.Param(jnp.zeros(d))

    def kernel(self) -> jax.Array:
        """`[k d/groups d]`: the kernel that is applied."""
        v = self.direction[...]
        return self.gain[...] * v * jax.lax.rsqrt(jnp.sum(jnp.square(v), (1, 2), keepdims=True))

    def __call__(self, x: Frames, lengths: Lengths) -> Frames:
        """`[b n d], [b] -> [b n d]`; padding counts as zero.

        Tap j of k meets frame `i + j - k // 2`, as in wav2vec2 (padding k // 2, the extra last frame dropped).
        """
        kernel = self.kernel()
        k, _, d = kernel.shape
        mask = mask_from_lengths(lengths, x.shape[1])
        if self.groups == d and k % 2:
            y = depthwise_conv(x, kernel[:, 0, :], mask)
        else:
            x = jnp.pad(zero_padding(x, mask), ((0, 0), (k // 2, (k - 1) // 2), (0, 0)))
            y = grouped_conv1d(x, kernel, self.groups)
        return jax.nn.gelu(y + self.bias[...], approximate=False)
