"""Layers of a speech encoder in plain float64 NumPy, for one utterance `[n d]` without padding.

Written from the equations, with loops where the indices are what a test is about. `w` is a dict of
parameters by dotted name, from `parameters`.
"""

import math

import numpy as np
from flax import nnx


def parameters(module) -> dict[str, np.ndarray]:
    """The trainable parameters in float64, by dotted path."""
    return parameters_of_state(nnx.state(module, nnx.Param))


def parameters_of_state(state) -> dict[str, np.ndarray]:
    """Parameters, or gradients of the same structure, in float64, by dotted path."""
    return {
        ".".join(map(str, path)): np.asarray(leaf[...], np.float64)
        for path, leaf in nnx.to_flat_state(state)
    }


def part(w, prefix):
    """The parameters below a path, without it."""
    return {k.removeprefix(prefix + "."): v for k, v in w.items() if k.startswith(prefix + ".")}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(w, x):
    return x @ w["kernel"] + w["bias"]


def layer_norm(w, x, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w["scale"] + w["bias"]


def normalize_over_time(x, eps=1e-5):
    centred = x - x.mean(0)
    return centred / np.sqrt((centred**2).mean(0) + eps)


def conv(x, kernel, stride=1, groups=1):
    """`y_i = sum_j x_{i s + j} K_j`, no padding; a group of outputs sees its group of inputs."""
    n, d = x.shape
    k, width, outputs = kernel.shape
    assert width * groups == d
    y = np.zeros((max(0, (n - k) // stride + 1), outputs))
    for i in range(len(y)):
        for g in range(groups):
            ins = slice(g * width, (g + 1) * width)
            outs = slice(g * (outputs // groups), (g + 1) * (outputs // groups))
            for j in range(k):
                y[i, outs] += x[i * stride + j, ins] @ kernel[j, :, outs]
    return y


def conv2d(x, kernel, stride):
    """`[f m c] -> [f' m' e]`, no padding; with one kernel input a channel, every channel alone."""
    rows, columns, inputs, d = kernel.shape
    frames, bins = (
        (n - size) // stride + 1 for n, size in zip(x.shape[:2], (rows, columns), strict=True)
    )
    y = np.zeros((frames, bins, d))
    for i, j, e in np.ndindex(y.shape):
        window = x[i * stride : i * stride + rows, j * stride : j * stride + columns]
        if inputs == 1 and x.shape[2] > 1:
            window = window[..., e : e + 1]
        y[i, j, e] = np.sum(window * kernel[..., e])
    return y


def depthwise_conv(x, kernel, causal=False):
    """`y_i = sum_j K_j x_{i + j - left}`, zeros outside."""
    n, k = len(x), len(kernel)
    left = k - 1 if causal else (k - 1) // 2
    y = np.zeros_like(x)
    for i in range(n):
        for j in range(k):
            if 0 <= i + j - left < n:
                y[i] += kernel[j] * x[i + j - left]
    return y


def softmax_attention(q, k, v, mask):
    """One head: `[n c], [m c], [m c]`, mask `[n m]`; every query sees a key."""
    y = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        seen = np.flatnonzero(mask[i])
        score = k[seen] @ q[i] / math.sqrt(q.shape[1])
        weight = np.exp(score - score.max())
        y[i] = weight / weight.sum() @ v[seen]
    return y


def self_attention(w, x, num_heads):
    q, k, v = (linear(part(w, name), x) for name in ("q_proj", "k_proj", "v_proj"))
    c = x.shape[1] // num_heads
    heads = [slice(h * c, (h + 1) * c) for h in range(num_heads)]
    everything = np.ones((len(x), len(x)), bool)
    y = [softmax_attention(q[:, h], k[:, h], v[:, h], everything) for h in heads]
    return linear(part(w, "out_proj"), np.concatenate(y, axis=1))


def feed_forward(w, x):
    return linear(part(w, "contract"), gelu(linear(part(w, "expand"), x)))


def encoder_layer(w, x, num_heads, norm_first):
    mixer, ffn = part(w, "mixer"), part(w, "ffn")
    mixer_norm, ffn_norm = part(w, "mixer_norm"), part(w, "ffn_norm")
    if norm_first:
        x = x + self_attention(mixer, layer_norm(mixer_norm, x), num_heads)
        return x + feed_forward(ffn, layer_norm(ffn_norm, x))
    x = layer_norm(mixer_norm, x + self_attention(mixer, x, num_heads))
    return layer_norm(ffn_norm, x + feed_forward(ffn, x))


def conv_positions(w, x, groups):
    """`gelu(conv(x) + b)`, tap j of k at frame `i + j - k // 2`, `K_j = g_j V_j / ||V_j||`."""
    v = w["direction"]
    k = len(v)
    kernel = np.stack([w["gain"][j] * v[j] / np.sqrt((v[j] ** 2).sum()) for j in range(k)])
    padded = np.zeros((len(x) + k - 1, x.shape[1]))
    padded[k // 2 : k // 2 + len(x)] = x
    return gelu(conv(padded, kernel, groups=groups) + w["bias"])


def waveform_front_end(w, audio, strides):
    """`[t] -> [n channels]`."""
    x = normalize_over_time(audio[:, None], 1e-7)
    for i, stride in enumerate(strides):
        x = conv(x, w[f"kernels.{i}"], stride)
        if i == 0:
            x = normalize_over_time(x) * w["norm_scale"] + w["norm_bias"]
        x = gelu(x)
    return x


def mel_matrix(num_mels):
    """Triangles of height 1 at equal steps of `2595 log10(1 + f / 700)`, 20 to 7600 Hz."""

    def mel(hz):
        return 2595 * math.log10(1 + hz / 700)

    low, high = mel(20), mel(7600)
    edges = [
        700 * (10 ** ((low + (high - low) * i / (num_mels + 1)) / 2595) - 1)
        for i in range(num_mels + 2)
    ]
    matrix = np.zeros((257, num_mels))
    for b in range(257):
        hz = b * 16_000 / 512
        for m in range(num_mels):
            left, peak, right = edges[m : m + 3]
            if left < hz <= peak:
                matrix[b, m] = (hz - left) / (peak - left)
            elif peak < hz < right:
                matrix[b, m] = (right - hz) / (right - peak)
    return matrix


def log_mel(audio, num_mels):
    """`[t] -> [f m]`: windows of 400 samples every 160, each a sum over 512 points of a DFT."""
    t = np.arange(400)
    hann = 0.5 - 0.5 * np.cos(2 * math.pi * t / 400)
    wave = np.exp(-2j * math.pi * np.outer(t, np.arange(257)) / 512)
    starts = range(0, len(audio) - 400 + 1, 160)
    power = np.stack([np.abs((audio[s : s + 400] * hann) @ wave) ** 2 for s in starts])
    return np.log(np.maximum(power @ mel_matrix(num_mels), 1e-7))


def logmel_front_end(w, audio, num_mels, num_strides, num_blocks):
    """`[t] -> [n channels]`. The tanh form of GELU is this front end's choice."""
    x = normalize_over_time(log_mel(audio, num_mels))
    for i in range(num_strides):
        x = layer_norm(part(w, f"norms.{i}"), gelu_tanh(conv(x, w[f"kernels.{i}"], stride=2)))
    for i in range(num_blocks):
        block = part(w, f"blocks.{i}")
        y = layer_norm(part(block, "norm"), depthwise_conv(x, block["depthwise"]))
        x = x + linear(part(block, "contract"), gelu_tanh(linear(part(block, "expand"), y)))
    return x
