"""The legend: what the letters in array shapes mean, everywhere in edgespeech.

| letter | meaning | unit |
|---|---|---|
| `b` | batch: utterances | |
| `t` | audio samples | 1/16000 s |
| `n` | encoder frames | 20 ms (waveform front end) or 40 ms (log-mel front end) |
| `f` | feature frames | 10 ms |
| `m` | mel bins | |
| `d` | model width | |
| `h` | heads | |
| `c` | channels of one head, `d = h * c` | |
| `p` | pulses of one head | |
| `v` | vocabulary, blank at 0 | |
| `u` | target tokens | |
| `l` | layers | |

Audio is float32 in [-1, 1] at 16 kHz. A mask is boolean and True marks what is valid. `lengths` counts valid
positions and padding is at the end. `Float[Array, "b n d"]` reads: an array of floats, shape `[b, n, d]`.
"""

from typing import TypeAlias

from jax import Array
from jaxtyping import Bool, Float, Int

SAMPLE_RATE = 16_000

Audio: TypeAlias = Float[Array, "b t"]
Frames: TypeAlias = Float[Array, "b n d"]
Lengths: TypeAlias = Int[Array, "b"]
Logits: TypeAlias = Float[Array, "b n v"]
Mask: TypeAlias = Bool[Array, "b n"]
Scalar: TypeAlias = Float[Array, ""]

__all__ = [
    "SAMPLE_RATE",
    "Array",
    "Audio",
    "Bool",
    "Float",
    "Frames",
    "Int",
    "Lengths",
    "Logits",
    "Mask",
    "Scalar",
]
