"""Log-mel features and SpecAugment, both on arrays inside jit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from edgespeech.errors import InputError
from edgespeech.ops.conv import conv_length
from edgespeech.ops.mask import mask_from_lengths, masked_mean, zero_padding
from edgespeech.types import SAMPLE_RATE, Array, Audio, Float, Frames, Lengths, Mask

WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
FFT = 512  # samples


@functools.cache
def mel_filters(
    num_mels: int, fft: int = FFT, low: float = 20.0, high: float = 7600.0
) -> np.ndarray:
    """Triangular filters `[fft/2+1, num_mels]` between two frequencies in Hz, equally spaced on the HTK mel scale.

    `mel(f) = 2595 log10(1 + f/700)`; every triangle has height 1.
    """

    def to_mel(hz):
        return 2595.0 * np.log10(1.0 + np.asarray(hz) / 700.0)

    edges = 700.0 * (10.0 ** (np.linspace(to_mel(low), to_mel(high), num_mels + 2) / 2595.0) - 1.0)
    hz = np.arange(fft // 2 + 1) * SAMPLE_RATE / fft
    rising = (hz[:, None] - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[None, 2:] - hz[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)


def log_mel(audio: Audio, num_mels: int = 80) -> Float[Array, "b f m"]:
    """`log(max(|STFT|^2 M, 1e-7))`: Hann window of 25 ms every 10 ms, `f = (t - 400) // 160 + 1`.

    No padding at the edges: a frame sees only its own 400 samples, so whatever follows an utterance in a batch
    changes none of its valid frames.
    """
    n = conv_length(audio.shape[1], WINDOW, HOP)
    index = np.arange(n)[:, None] * HOP + np.arange(WINDOW)[None, :]
    window = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
    spectrum = jnp.fft.rfft(audio.astype(jnp.float32)[:, index] * window, n=FFT)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return jnp.log(jnp.maximum(power @ mel_filters(num_mels), 1e-7))


def feature_lengths(audio_lengths: Lengths) -> Lengths:
    """Frames of 10 ms that lie wholly inside each utterance."""
    return conv_length(audio_lengths, WINDOW, HOP)


def normalize_features(x: Frames, lengths: Lengths) -> Frames:
    """Zero mean and unit variance of every mel bin over the valid frames; padding becomes 0."""
    mask = mask_from_lengths(lengths, x.shape[1])
    x = zero_padding(x, mask)
    centred = x - masked_mean(x, mask[..., None], axis=1)
    variance = masked_mean(jnp.square(centred), mask[..., None], axis=1)
    return zero_padding(centred * jax.lax.rsqrt(variance + 1e-5), mask)


@dataclasses.dataclass(frozen=True)
class SpecAugmentConfig:
    """SpecAugment (Park et al., 2019, arXiv 1904.08779), with as many time masks as the length asks for.

    Attributes:
        frequency_masks: bands set to zero per utterance.
        frequency_width: largest width of a band, mel bins.
        time_mask_rate: time masks per frame of 10 ms (0.01: one a second).
        time_width: largest width of a time mask, frames of 10 ms.
        max_time_masks: upper limit of the masks of one utterance.

    Raises:
        InputError: a value is below 0.
    """

    frequency_masks: int = 2
    frequency_width: int = 20
    time_mask_rate: float = 0.006
    time_width: int = 30
    max_time_masks: int = 12

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 0:
                raise InputError(f"spec_augment.{field.name} is {value}: it must be at least 0")


def _random_spans(
    key: Array, batch: int, count: int, max_width: int, widest: Array, room: Array
) -> tuple[Array, Array]:
    """Starts and ends `[b count]` of spans inside `[0, room)`.

    Widths are uniform in 0..max_width and then cut at `widest`; starts are uniform where the span fits.
    """
    width_key, start_key = jax.random.split(key)
    width = jax.random.uniform(width_key, (batch, count)) * (max_width + 1)
    width = jnp.minimum(jnp.floor(width), widest)
    start = jnp.floor(jax.random.uniform(start_key, (batch, count)) * (room - width + 1))
    return start, start + width


def time_spans(key: Array, lengths: Lengths, n: int, config: SpecAugmentConfig) -> Mask:
    """Random spans `[b n]` (True = masked): the longer the utterance, the more of them.

    None is wider than a twentieth of the length and one frame more, which keeps a short utterance's words.
    """
    room = lengths.astype(jnp.float32)[:, None]
    widest = jnp.minimum(room, jnp.floor(room * 0.05) + 1)
    start, end = _random_spans(
        key, lengths.shape[0], config.max_time_masks, config.time_width, widest, room
    )
    wanted = jnp.round(room * config.time_mask_rate)
    end = jnp.where(jnp.arange(config.max_time_masks)[None, :] < wanted, end, start)
    frames = jnp.arange(n)
    return jnp.any((frames >= start[..., None]) & (frames < end[..., None]), axis=1)


def spec_augment(x: Frames, lengths: Lengths, config: SpecAugmentConfig, key: Array) -> Frames:
    """Sets random bands and spans of normalised features `[b f m]` to 0, their mean."""
    b, f, m = x.shape
    band_key, span_key = jax.random.split(key)
    bins_in_all = jnp.float32(m)
    low, high = _random_spans(
        band_key, b, config.frequency_masks, config.frequency_width, bins_in_all, bins_in_all
    )
    bins = jnp.arange(m)
    band = jnp.any((bins >= low[..., None]) & (bins < high[..., None]), axis=1)
    span = time_spans(span_key, lengths, f, config)
    return jnp.where(band[:, None, :] | span[:, :, None], 0.0, x)
