"""Moonshine in plain float64 NumPy, for one utterance; and the tiny model of the tests."""

import jax
import numpy as np
from flax import nnx

from edgespeech.models.moonshine import Moonshine, MoonshineConfig
from tests.support import reference
from tests.support.modules import randomize

SIZES = {
    "vocab_size": 11,
    "width": 16,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "ffn_width": 24,
}


def tiny_moonshine(seed: int = 0, scale: float = 0.1, **changes) -> Moonshine:
    """Two layers each of width 16, six of a head's eight channels with positions, random parameters."""
    config = MoonshineConfig(**{**SIZES, "rotary_factor": 0.8, **changes})
    return randomize(Moonshine(config, rngs=nnx.Rngs(seed)), seed, scale)


def speech(lengths=(4000, 2600), seed=1):
    """Noise as float32 `[b t]`, and its lengths."""
    audio = 0.1 * np.random.default_rng(seed).normal(size=(len(lengths), max(lengths)))
    return np.float32(audio), np.array(lengths, np.int32)


call = jax.jit(
    lambda graphdef, state, *inputs: nnx.merge(graphdef, state)(*inputs), static_argnums=0
)


def norm(w, x):
    return reference.layer_norm(w | {"bias": 0.0}, x)


def turn(x, width):
    """`[n c]`: pairs of channels as complex numbers, turned by their positions."""
    y = x.copy()
    for i in range(0, width, 2):
        angle = np.arange(len(x)) * 10_000.0 ** (-i / width)
        z = (x[:, i] + 1j * x[:, i + 1]) * np.exp(1j * angle)
        y[:, i], y[:, i + 1] = z.real, z.imag
    return y


def attention(w, x, memory, num_heads, width, mask):
    q, k, v = (
        y @ w[f"{name}.kernel"]
        for name, y in (("q_proj", x), ("k_proj", memory), ("v_proj", memory))
    )
    heads = []
    for h in np.split(np.arange(x.shape[1]), num_heads):
        q_h, k_h = (turn(q[:, h], width), turn(k[:, h], width)) if width else (q[:, h], k[:, h])
        heads.append(reference.softmax_attention(q_h, k_h, v[:, h], mask))
    return np.concatenate(heads, axis=1) @ w["out_proj.kernel"]


def front_end(w, audio):
    x = np.tanh(reference.conv(audio[:, None], w["kernels.0"], 64))
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w["norm.scale"] + w["norm.bias"]
    x = reference.gelu(reference.conv(x, w["kernels.1"], 3) + w["biases.0"])
    return reference.gelu(reference.conv(x, w["kernels.2"], 2) + w["biases.1"])


def forward(model, audio, tokens):
    """Hidden states of the encoder, its output, hidden states of the decoder, logits."""
    config, w = model.config, reference.parameters(model)
    h, width, part = config.num_heads, config.rotary_width, reference.part
    x = front_end(part(w, "front_end"), audio)
    hidden, decoder_hidden = [], []
    for i in range(config.num_layers):
        layer = part(w, f"layers.{i}")
        y = norm(part(layer, "mixer_norm"), x)
        x = x + attention(part(layer, "mixer"), y, y, h, width, np.ones((len(x), len(x)), bool))
        x = x + reference.feed_forward(part(layer, "ffn"), norm(part(layer, "ffn_norm"), x))
        hidden.append(x)
    memory = norm(part(w, "norm"), x)
    x = w["embedding"][tokens]
    for i in range(config.num_decoder_layers):
        layer = part(w, f"decoder_layers.{i}")
        y = norm(part(layer, "attention_norm"), x)
        x = x + attention(part(layer, "attention"), y, y, h, width, np.tri(len(x), dtype=bool))
        y = norm(part(layer, "cross_attention_norm"), x)
        everything = np.ones((len(x), len(memory)), bool)
        x = x + attention(part(layer, "cross_attention"), y, memory, h, 0, everything)
        y = reference.linear(part(layer, "ffn.expand"), norm(part(layer, "ffn_norm"), x))
        a, gate = y[:, : config.ffn_width], y[:, config.ffn_width :]
        y = a * gate * reference.sigmoid(gate)
        x = x + reference.linear(part(layer, "ffn.contract"), y)
        decoder_hidden.append(x)
    logits = norm(part(w, "decoder_norm"), x) @ w["embedding"].T
    return hidden, memory, decoder_hidden, logits
