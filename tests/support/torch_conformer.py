"""The early-exit Conformer and Splitformer in plain PyTorch: an oracle with the released code's names of tensors.

Written from the papers (arXiv 2005.08100, 2309.09546, 2506.18035) for utterances without padding.
"""

import math

import torch
from torch import nn


class FeedForward(nn.Module):
    def __init__(self, d, width):
        super().__init__()
        self.sequential = nn.Sequential(
            nn.LayerNorm(d),
            nn.Linear(d, width),
            nn.SiLU(),
            nn.Identity(),  # upstream's dropout has a number too
            nn.Linear(width, d),
        )

    def forward(self, x):
        return self.sequential(x)


class ConvModule(nn.Module):
    def __init__(self, d, kernel, norm):
        super().__init__()
        self.layer_norm = nn.LayerNorm(d)
        self.sequential = nn.Sequential(
            nn.Conv1d(d, 2 * d, 1),
            nn.GLU(dim=1),
            nn.Conv1d(d, d, kernel, padding=kernel // 2, groups=d),
            nn.BatchNorm1d(d) if norm == "batch" else nn.GroupNorm(1, d),
            nn.SiLU(),
            nn.Conv1d(d, d, 1),
        )

    def forward(self, x):
        return self.sequential(self.layer_norm(x).mT).mT


class Layer(nn.Module):
    """One Conformer layer, `[b n d] -> [b n d]`."""

    def __init__(self, d, heads, width, kernel, norm="batch"):
        super().__init__()
        self.ffn1 = FeedForward(d, width)
        self.self_attn_layer_norm = nn.LayerNorm(d)
        self.self_attn = nn.MultiheadAttention(d, heads, batch_first=True)
        self.conv_module = ConvModule(d, kernel, norm)
        self.ffn2 = FeedForward(d, width)
        self.final_layer_norm = nn.LayerNorm(d)

    def forward(self, x):
        x = x + self.ffn1(x) / 2
        y = self.self_attn_layer_norm(x)
        x = x + self.self_attn(y, y, y, need_weights=False)[0]
        x = x + self.conv_module(x)
        return self.final_layer_norm(x + self.ffn2(x) / 2)


class Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.conformer_layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.conformer_layers:
            x = layer(x)
        return x


class Subsampling(nn.Module):
    def __init__(self, mels, d):
        super().__init__()
        self.sequential = nn.Sequential(nn.Conv1d(mels, d, 3, 2), nn.Conv1d(d, d, 3, 2))

    def forward(self, features):
        return self.sequential(features).mT


class EarlyExitConformer(nn.Module):
    """Logits of every exit from features `[b mels f]`; `branches`: exits with a parallel layer, from 0."""

    def __init__(self, config, branches):
        super().__init__()
        self.branches = list(branches)
        sizes = config.width, config.num_heads, config.ffn_width, config.conv_kernel
        self.conv_subsample = Subsampling(config.num_mels, config.width)
        self.conformer = nn.ModuleList(
            Stack(Layer(*sizes) for _ in range(config.layers_per_exit))
            for _ in range(config.num_exits)
        )
        if self.branches:
            self.conformer_parallel = nn.ModuleList(Stack([Layer(*sizes)]) for _ in self.branches)
        self.linears = nn.ModuleList(
            nn.Linear(config.width, config.vocab_size) for _ in range(config.num_exits)
        )

    def forward(self, features):
        x = self.conv_subsample(features)
        x = x + sinusoids(x.shape[1], x.shape[2])
        logits = []
        for m, (stack, linear) in enumerate(zip(self.conformer, self.linears, strict=True)):
            h = stack(x)
            if m in self.branches:
                v = nn.functional.pad(x, (0, 0, 0, x.shape[1] % 2))[:, ::2]
                v = self.conformer_parallel[self.branches.index(m)](v)
                h = h + v.repeat_interleave(2, dim=1)[:, : x.shape[1]]
            x = h
            logits.append(linear(x))
        return logits


def sinusoids(n, d):
    table = torch.zeros(n, d)
    for p in range(n):
        for k in range(0, d, 2):
            angle = p / math.pow(10000.0, k / d)
            table[p, k], table[p, k + 1] = math.sin(angle), math.cos(angle)
    return table


def power_mel_spectrum(audio):
    """`|STFT|^2`, `[b t] -> [b 513 f]`, as torchaudio's Spectrogram of 1024 points, window 320, hop 160."""
    stft = torch.stft(
        audio,
        n_fft=1024,
        hop_length=160,
        win_length=320,
        window=torch.hann_window(320),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    return stft.abs() ** 2


def randomize(module, seed=0, scale=0.2):
    """Adds noise to parameters and running statistics, variances kept positive; returns the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = scale * torch.randn(tensor.shape, generator=generator)
            tensor += noise.abs() if name.endswith("running_var") else noise
    return module
