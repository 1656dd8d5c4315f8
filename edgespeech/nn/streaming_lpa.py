"""Streaming LPA: Learnable Pulse Accumulation as a recurrent mixer with O(1) state per stream.

LPA (arXiv 2603.16922) averages what lies inside a pulse. A causal pulse averages what it has seen of
its inside so far. That form and the decaying windows are ours:

    A_pi = s_pi / (c_pi + eps)      s_pi = a_pi s_p,i-1 + g_pi v_i      c_pi = a_pi c_p,i-1 + g_pi
    y_i  = sum_p alpha_p g_pi A_pi + lambda DWConv(v)_i                 out = concat_h(y) W_O + b_O

    runs      g = sigmoid((w.z_i + b) / tau), a = g: a closed gate resets the pulse
    periodic  g as in LPA with i the frame of the stream, a = 2^(-1/H): the windows of late, the newest most
    mean      g = 1, a = 2^(-1/H): the mean of what came so far, the newest most

The depthwise convolutions, in front of the content gates and on the local path, see the past alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from edgespeech.errors import InputError
from edgespeech.nn.causal_conv import carry_over
from edgespeech.nn.lpa import GATE_TAU, LPA
from edgespeech.nn.lpa_config import LPAConfig
from edgespeech.ops import pulse
from edgespeech.ops.accumulate import RunState, run_average_init
from edgespeech.ops.causal_accumulate import causal_accumulate, window_decay
from edgespeech.ops.conv import depthwise_conv
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Float, Frames, Int, Lengths, Mask

# 16 pulses a head, as many as LPA's default; all of them ours.
STREAMING_CONFIG = LPAConfig(aperiodic=0, runs=8, periodic=4, positional=0, mean=4)


class StreamingState(NamedTuple):
    """What a stream remembers, however many frames it has seen.

    Attributes:
        position: frames seen, int32.
        content: the last `kernel_size - 1` inputs; none where no gate reads the content.
        values: the last `local_kernel_size - 1` values; none without a local path.
        average: sums and counts of the pulses, float32.
    """

    position: Int[Array, "b"]
    content: Float[Array, "b k d"]
    values: Float[Array, "b k d"]
    average: RunState


class StreamingLPA(LPA):
    """Causal LPA, `(x [b n d], lengths [b]) -> [b n d]`, and the same frame by frame in `step`.

    `harden`, `anneal` and `set_anneal` act on it as on `LPA`, and `from_attention` makes one. A
    stream may last 2^24 frames (186 hours of 40 ms): up to there its periodic windows are exact.

    Half-lives H start log-spaced from 2 to `max_period` frames, a periodic pulse's at its period, and
    are learned (ours); other initial values are LPA's. Periods stay.

    Attributes:
        latency: 0; an output frame needs no input frame after its own.
        stride: 1, input frames to an output frame.
        log2_half_life: log2 of H in frames, `[h p]`, of periodic pulses, then of means.

    Raises:
        InputError: the config has rectangles or positional windows, which are placed within the whole
            utterance; or num_heads does not divide the width.
    """

    causal = True
    latency = 0
    stride = 1

    def __init__(
        self,
        d: int,
        num_heads: int,
        config: LPAConfig = STREAMING_CONFIG,
        *,
        rngs: nnx.Rngs,
        inference: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        for kind in ("aperiodic", "positional"):
            if getattr(config, kind):
                raise InputError(
                    f"StreamingLPA got config.{kind}={getattr(config, kind)}: these pulses are placed within "
                    "the whole utterance; set it to 0 and use runs, periodic or mean"
                )
        super().__init__(
            d,
            num_heads,
            config,
            rngs=rngs,
            inference=inference,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        if config.periodic or config.mean:
            half_lives = [
                pulse.log_spaced_periods(num_heads, pulses, config.max_period)
                for pulses in (config.periodic, config.mean)
            ]
            log2_half_life = np.log2(np.concatenate(half_lives, axis=1))
            self.log2_half_life = nnx.Param(jnp.asarray(log2_half_life, param_dtype))

    @property
    def receptive_field(self) -> tuple[int | None, int]:
        """Input frames that an output frame depends on, before it (None: unbounded) and after it."""
        return (None if self.config.num_pulses else self.config.local_kernel_size - 1), 0

    def init_state(self, batch: int) -> StreamingState:
        """State of so many streams before their first frame."""
        c, d = self.config, self.v_proj.in_features
        dtype = self.v_proj.dtype or jnp.float32
        content = c.kernel_size - 1 if hasattr(self, "content_kernel") else 0
        values = c.local_kernel_size - 1 if c.local else 0
        return StreamingState(
            position=jnp.zeros(batch, jnp.int32),
            content=jnp.zeros((batch, content, d), dtype),
            values=jnp.zeros((batch, values, d), dtype),
            average=run_average_init(batch, self.num_heads, c.num_pulses, d // self.num_heads),
        )

    def state_bytes(self, batch: int) -> int:
        """Bytes of the state of so many streams."""
        leaves = jax.tree.leaves(jax.eval_shape(lambda: self.init_state(batch)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    def __call__(self, x: Frames, lengths: Lengths) -> Frames:
        """`[b n d], [b] -> [b n d]`: whole sequences, as one step of new streams."""
        return self.step(x, lengths, self.init_state(x.shape[0]))[0]

    def step(
        self, chunk: Frames, lengths: Lengths, state: StreamingState
    ) -> tuple[Frames, Lengths, StreamingState]:
        """The next frames of every stream.

        Args:
            chunk: `[b c d]`, any number of frames c.
            lengths: `[b]`, how many of them are valid; a stream may bring none.
            state: from the step before.

        Returns:
            output `[b c d]`, its valid lengths `[b]` (those of the chunk), and the new state.
        """
        mask = mask_from_lengths(lengths, chunk.shape[1])
        x = zero_padding(chunk, mask)
        v = zero_padding(self.v_proj(x), mask)
        z, content = self._causal_content(x, lengths, state.content)
        y, average = None, state.average
        if self.config.num_pulses:
            gates = self._causal_gates(z, mask, state.position)
            gate = jnp.concatenate([g.astype(jnp.float32) for g in gates.values()], axis=2)
            decay = self._decay(gate, mask)
            y, average = causal_accumulate(decay, gate, self._heads(v), self._readout(z), average)
        local, values = None, state.values
        if self.config.local:
            local, values = causal_conv(v, self.local_kernel[...], values, lengths)
        position = state.position + lengths.astype(jnp.int32)
        out = self._output(y, local, v.dtype)
        return out, lengths, StreamingState(position, content, values, average)

    def gates(self, x: Frames, lengths: Lengths) -> dict[str, Float[Array, "b h p n"]]:
        """Gates of each kind present, at the current temperature, in the order of `alpha`."""
        mask = mask_from_lengths(lengths, x.shape[1])
        state = self.init_state(x.shape[0])
        z, _ = self._causal_content(zero_padding(x, mask), lengths, state.content)
        gates = self._causal_gates(z, mask, state.position)
        return {kind: gate.astype(jnp.float32) for kind, gate in gates.items()}

    def _causal_content(self, x: Frames, lengths: Lengths, past: Array) -> tuple[Frames, Array]:
        """What content gates read, as in `LPA._content`, and the inputs to remember."""
        if not hasattr(self, "content_kernel"):
            return x, past
        x = x.astype(self.v_proj.dtype or x.dtype)
        return causal_conv(x, self.content_kernel[...], past, lengths)

    def _causal_gates(
        self, z: Frames, mask: Mask, position: Int[Array, "b"]
    ) -> dict[str, pulse.Gates]:
        """Gates `[b h p n]` by kind, of frames `position`, `position + 1`, ... of their streams."""
        c, gates = self.config, {}
        if c.runs:
            gates["runs"] = self._run_gates(z, mask)
        if c.periodic:
            gates["periodic"] = self._periodic_gates(mask, position)
        if c.mean:
            gates["mean"] = self._mean_gates(mask)
        return gates

    def _periodic_gates(self, mask: Mask, position: Int[Array, "b"]) -> pulse.Gates:
        """`pulse.periodic_gates` with the frames of a stream: each is frame 0 at a phase turned back by i / T."""
        (b, n), h, p = mask.shape, self.num_heads, self.config.periodic
        T = pulse.log_spaced_periods(h, p, self.config.max_period)
        i = (position[:, None] + jnp.arange(n)).astype(jnp.float32)[..., None, None]
        turned = self.phase[...].astype(jnp.float32) - lax.rem(*jnp.broadcast_arrays(i, T)) / T
        gates = pulse.periodic_gates(
            T,
            turned.reshape(b * n, h, p),
            jax.nn.sigmoid(self.duty_logit[...].astype(jnp.float32)),
            mask.reshape(b * n, 1),
            self._temperature(*GATE_TAU),
            self._hard(),
        )
        return gates.reshape(b, n, h, p).transpose(0, 2, 3, 1)

    def _decay(self, gate: Float[Array, "b h p n"], mask: Mask) -> Float[Array, "b h p n"]:
        """What every pulse keeps of its past: in a run its gate, on padding everything."""
        runs = self.config.runs
        decay = gate[:, :, :runs]
        if runs < self.config.num_pulses:
            window = window_decay(self.log2_half_life[...].astype(jnp.float32))[..., None]
            window = jnp.broadcast_to(window, gate[:, :, runs:].shape)
            decay = jnp.concatenate([decay, window], axis=2)
        return jnp.where(mask[:, None, None, :], decay, 1.0)


def causal_conv(
    x: Frames, kernel: Float[Array, "k d"], past: Float[Array, "b k-1 d"], lengths: Lengths
) -> tuple[Frames, Float[Array, "b k-1 d"]]:
    """Causal depthwise convolution of the next frames of every stream, and the frames to remember.

    `y_i = sum_j K_j * x_{i + j - (k - 1)}` with `past` in front of x; `past` of zeros is a new stream.
    The convolution comes in the dtype of x, what is remembered in that of `past`.
    """
    k = past.shape[1]
    joined = jnp.concatenate([past.astype(x.dtype), x], axis=1)
    y = depthwise_conv(joined, kernel, causal=True)[:, k:]
    return y, carry_over(joined, lengths, k).astype(past.dtype)
