"""Log-mel features of a stream, normalised by what came before."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.nn.causal_conv import carry_over, whole_chunks
from edgespeech.ops.features import HOP, WINDOW, log_mel
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Audio, Float, Frames, Lengths

# Ours: what a mel bin is held to be like before the first frame, and for how many frames that counts. Recordings of
# LibriSpeech, LJSpeech and Common Voice, three each, have means of -4.1 to -8.8 and deviations of 2.9 to 5.1.
PRIOR_MEAN = -6.0
PRIOR_VARIANCE = 16.0
PRIOR_FRAMES = 100.0
# Ours: 3 s of memory; speech after long silence is not blown up by more than 1 / sqrt(LEAST_VARIANCE).
DECAY = 1.0 - 1.0 / 300.0
LEAST_VARIANCE = 1.0


def decayed_sums(
    x: Float[Array, "b n k"], decay: float, initial: Float[Array, "b k"]
) -> Float[Array, "b n k"]:
    """`s_i = decay s_{i-1} + x_i` with `s_{-1} = initial`, by an associative scan."""
    x = x.at[:, 0].add(decay * initial)
    factors = jnp.full((1, x.shape[1], 1), decay, x.dtype)

    def combine(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(combine, (factors, x), axis=1)[1]


class RunningNorm(nnx.Module):
    """Mean and variance normalisation of every mel bin by an exponential window over the frames so far (ours).

        W_i = g W_{i-1} + 1,   S_i = g S_{i-1} + (x_i - m),   Q_i = g Q_{i-1} + (x_i - m)^2
        y_i = (x_i - m - S_i / W_i) / sqrt(max(Q_i / W_i - (S_i / W_i)^2, 1)),   g = 1 - 1/300

    The mean over an utterance would need its end. m is a fixed mean; it and a fixed variance count as 100 frames ahead
    of the first (`PRIOR_*`). No statistics of a corpus are needed, a change of level is forgotten within seconds, and
    the sums of hours stay as small as those of seconds.

    Attributes:
        stride, latency, receptive_field: of the stream, in frames: see `StreamingConvolution`.
    """

    stride = 1
    latency = 0
    receptive_field = (None, 0)

    def __init__(self, num_mels: int):
        self.num_mels = num_mels

    def __call__(self, x: Float[Array, "b f m"], lengths: Lengths) -> Float[Array, "b f m"]:
        """`[b f m], [b] -> [b f m]` in float32; padding becomes 0."""
        return self.step(x, lengths, self.init_state(x.shape[0]))[0]

    def init_state(self, batch: int) -> Float[Array, "b k"]:
        """S, Q and W before the first frame, side by side: `[b 2m+1]`."""
        one = jnp.ones(self.num_mels, jnp.float32)
        start = [0.0 * one, PRIOR_FRAMES * PRIOR_VARIANCE * one, PRIOR_FRAMES * one[:1]]
        return jnp.tile(jnp.concatenate(start), (batch, 1))

    def step(
        self, chunk: Float[Array, "b c m"], lengths: Lengths, state: Float[Array, "b k"]
    ) -> tuple[Float[Array, "b c m"], Lengths, Float[Array, "b k"]]:
        """The next frames of every stream, and the state after them."""
        mask = mask_from_lengths(lengths, chunk.shape[1])
        x = zero_padding(chunk.astype(jnp.float32) - PRIOR_MEAN, mask)
        summands = jnp.concatenate([x, jnp.square(x), jnp.ones_like(x[..., :1])], axis=-1)
        sums = decayed_sums(summands, DECAY, state)
        S, Q, W = jnp.split(sums, [self.num_mels, 2 * self.num_mels], axis=-1)
        mean = S / W
        variance = jnp.maximum(Q / W - jnp.square(mean), LEAST_VARIANCE)
        y = zero_padding((x - mean) * jax.lax.rsqrt(variance), mask)
        after = carry_over(jnp.concatenate([state[:, None], sums], axis=1), lengths, 1)[:, 0]
        return y, lengths, after


class FeatureState(NamedTuple):
    """What the next samples need of those before.

    Attributes:
        samples: `[b 240]`, the last ones.
        norm: of the `RunningNorm`.
    """

    samples: Float[Array, "b t"]
    norm: Float[Array, "b k"]


class StreamingLogMel(nnx.Module):
    """`log_mel` and `RunningNorm`, whole or in steps: one frame for every 160 samples.

    240 zeros precede the audio, so that frame f sees the samples `160 f - 240 .. 160 f + 159` and is there with the
    last of them (ours; `log_mel` alone starts with the first whole window).

    Attributes:
        chunk, stride, latency, receptive_field: of the stream, in samples: see `StreamingConvolution`.
    """

    chunk = HOP
    stride = HOP
    latency = HOP - 1
    receptive_field = (None, HOP - 1)

    def __init__(self, num_mels: int):
        self.num_mels = num_mels
        self.norm = RunningNorm(num_mels)

    def __call__(self, audio: Audio, lengths: Lengths) -> tuple[Float[Array, "b f m"], Lengths]:
        """`[b t], [b] -> [b t//160 m], [b]`: float32 in [-1, 1] at 16 kHz to normalised log-mel frames of 10 ms."""
        audio = jnp.where(mask_from_lengths(lengths, audio.shape[1]), audio, 0.0)
        x = log_mel(jnp.pad(audio, ((0, 0), (WINDOW - HOP, 0))), self.num_mels)
        return self.norm(x, lengths // HOP), lengths // HOP

    def init_state(self, batch: int) -> FeatureState:
        """Silence before the first sample."""
        return FeatureState(
            jnp.zeros((batch, WINDOW - HOP), jnp.float32), self.norm.init_state(batch)
        )

    def step(
        self, chunk: Audio, lengths: Lengths, state: FeatureState
    ) -> tuple[Frames, Lengths, FeatureState]:
        """The next samples of every stream, `[b c], [b] -> [b c/160 m], [b]`, and the state after them.

        Raises:
            InputError: c is not a multiple of 160.
        """
        whole_chunks("StreamingLogMel", chunk.shape[1], self.chunk)
        chunk = jnp.where(mask_from_lengths(lengths, chunk.shape[1]), chunk, 0.0)
        joined = jnp.concatenate([state.samples, chunk], axis=1)
        x, frames, norm = self.norm.step(log_mel(joined, self.num_mels), lengths // HOP, state.norm)
        return x, frames, FeatureState(carry_over(joined, lengths, WINDOW - HOP), norm)
