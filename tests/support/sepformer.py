"""SepFormer in plain float64 NumPy, for one utterance without padding; `w` as in `tests.support.reference`."""

import math

import numpy as np

from edgespeech.models.sepformer import SepFormerConfig
from tests.support.reference import layer_norm, linear, part, self_attention, sigmoid

# What is compared with SpeechBrain's: a stride of 4 samples.
SMALL = SepFormerConfig(
    num_filters=20,
    width=16,
    kernel_size=8,
    chunk_length=6,
    num_intra_layers=2,
    num_inter_layers=1,
    num_heads=2,
    ffn_width=24,
)

# Small enough for tests: two blocks of two layers within chunks and one across.
TOY = SepFormerConfig(
    sample_rate=16_000,
    num_filters=12,
    width=8,
    kernel_size=64,
    chunk_length=20,
    num_blocks=2,
    num_intra_layers=2,
    num_inter_layers=1,
    num_heads=2,
    ffn_width=12,
)


def positions(n, d):
    table = np.zeros((n, d))
    for i in range(n):
        for j in range(0, d, 2):
            angle = i / 10000 ** (j / d)
            table[i, j], table[i, j + 1] = math.sin(angle), math.cos(angle)
    return table


def global_norm(w, x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-8) * w["scale"] + w["bias"]


def dual_path_layer(w, x, num_heads):
    """With no heads, a layer without a mixer."""
    y = layer_norm(part(w, "mixer_norm"), x, 1e-6)
    if num_heads:
        x = x + self_attention(part(w, "mixer"), y, num_heads)
    ffn = part(w, "ffn")
    hidden = linear(part(ffn, "expand"), layer_norm(part(w, "ffn_norm"), x, 1e-6))
    return x + linear(part(ffn, "contract"), np.maximum(hidden, 0))


def path_transformer(w, x, num_heads):
    """The outputs of the layers, and the normalised last one."""
    x, outputs = x + positions(*x.shape), []
    while f"layers.{len(outputs)}.mixer_norm.scale" in w:
        x = dual_path_layer(part(w, f"layers.{len(outputs)}"), x, num_heads)
        outputs.append(x)
    return outputs, layer_norm(part(w, "norm"), x, 1e-6)


def dual_path_block(w, x, num_heads):
    """Chunks `[s k d]` to chunks, and the outputs `[s k d]` of the layers within them."""
    within = [path_transformer(part(w, "intra"), chunk, num_heads) for chunk in x]
    hidden = [np.stack(layer) for layer in zip(*(layers for layers, _ in within), strict=True)]
    y = x + global_norm(part(w, "intra_norm"), np.stack([last for _, last in within]))
    across = [path_transformer(part(w, "inter"), y[:, i], num_heads)[1] for i in range(x.shape[1])]
    return y + global_norm(part(w, "inter_norm"), np.stack(across, axis=1)), hidden


def sepformer(w, config, audio):
    """`[t]` -> estimates `[spk t]` and masks `[spk n d]`."""
    kernel, stride, k = config.kernel_size, config.stride, config.chunk_length
    n = max(1, math.ceil(len(audio) / stride) - 1)
    x = np.zeros((n - 1) * stride + kernel)
    x[: len(audio)] = audio
    h = np.stack([x[i * stride : i * stride + kernel] @ w["encoder"][:, 0] for i in range(n)])
    h = np.maximum(h, 0)

    m = part(w, "mask_network")
    y = global_norm(part(m, "norm"), h) @ m["bottleneck.kernel"]
    count = 2 * ((n + k // 2) // k + 1)
    padded = np.zeros(((count + 1) * k // 2, config.width))
    padded[k // 2 : k // 2 + n] = y
    chunks = np.stack([padded[s * k // 2 : s * k // 2 + k] for s in range(count)])
    for block in range(config.num_blocks):
        chunks, _ = dual_path_block(part(m, f"blocks.{block}"), chunks, config.num_heads)
    chunks = linear(part(m, "speakers"), np.where(chunks >= 0, chunks, m["slope"] * chunks))
    joined = np.zeros((len(padded), chunks.shape[-1]))
    for s in range(count):
        joined[s * k // 2 : s * k // 2 + k] += chunks[s]
    joined = joined[k // 2 : k // 2 + n]

    masks, estimates = [], []
    for speaker in range(config.num_speakers):
        o = joined[:, speaker * config.width : (speaker + 1) * config.width]
        gated = np.tanh(linear(part(m, "output"), o)) * sigmoid(linear(part(m, "gate"), o))
        masks.append(np.maximum(gated @ m["expand.kernel"], 0))
        audio_out = np.zeros(len(x))
        for i, frame in enumerate(masks[-1] * h):
            audio_out[i * stride : i * stride + kernel] += w["decoder"][:, 0] @ frame
        estimates.append(audio_out[: len(audio)])
    return np.stack(estimates), np.stack(masks)
