"""The front end against a DFT by hand and PyTorch's STFT; frames by the sample."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.mel_subsampling import MelSubsampling, power_mel
from edgespeech.ops.features import SpecAugmentConfig
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.modules import randomize

MELS, D = 6, 4
LENGTHS = np.array([2500, 1700])
SHORT = SpecAugmentConfig(frequency_width=4, time_mask_rate=0.3, time_width=4)
call = nnx.jit(lambda module, x, lengths: module(x, lengths))
features = jax.jit(power_mel, static_argnums=2)


def audio(t=2500):
    return 0.1 * np.random.default_rng(0).normal(size=(2, t))


def mel_matrix(num_mels):
    def mel(hz):
        return 2595 * math.log10(1 + hz / 700)

    edges = [700 * (10 ** (mel(8000) * i / (num_mels + 1) / 2595) - 1) for i in range(num_mels + 2)]
    matrix = np.zeros((513, num_mels))
    for b in range(513):
        hz = b * 16_000 / 1024
        for m in range(num_mels):
            left, peak, right = edges[m : m + 3]
            if left < hz <= peak:
                matrix[b, m] = (hz - left) / (peak - left)
            elif peak < hz < right:
                matrix[b, m] = (right - hz) / (right - peak)
    return matrix


def power_mel_reference(x, num_mels):
    """`[t] -> [f m]`, float64."""
    padded = np.pad(x, 160, mode="reflect")
    k = np.arange(320)
    hann = 0.5 - 0.5 * np.cos(2 * math.pi * k / 320)
    wave = np.exp(-2j * math.pi * np.outer(k, np.arange(513)) / 1024)
    frames = [padded[i : i + 320] for i in range(0, len(x) + 1, 160)]
    power = np.stack([np.abs((frame * hann) @ wave) ** 2 for frame in frames])
    return power @ mel_matrix(num_mels)


def test_power_mel():
    x = audio()
    out = padding_contract(
        lambda x, n: features(x, n, MELS), np.float32(x), LENGTHS, out_length=lambda t: 1 + t // 160
    )
    for row, t in enumerate(LENGTHS):
        want = power_mel_reference(x[row, :t], MELS)
        np.testing.assert_allclose(out[row, : len(want)], want, rtol=1e-4, atol=1e-5)


def test_power_mel_equals_torch():
    torch = pytest.importorskip("torch")
    from tests.support.torch_conformer import power_mel_spectrum

    x = np.float32(audio())
    spectrum = power_mel_spectrum(torch.from_numpy(x)).numpy()
    want = np.swapaxes(spectrum, 1, 2) @ mel_matrix(80)
    np.testing.assert_allclose(features(x, np.array([2500] * 2), 80), want, rtol=1e-3, atol=1e-5)


def log_mel_reference(x, num_mels):
    return reference.normalize_over_time(reference.log_mel(x, num_mels))


@pytest.mark.parametrize(
    ("kind", "oracle"), [("paper", power_mel_reference), ("fixed", log_mel_reference)]
)
def test_front_end(kind, oracle):
    module = randomize(
        MelSubsampling(D, MELS, kind, SpecAugmentConfig(), rngs=nnx.Rngs(0)), scale=0.1
    )
    x = audio()
    out = padding_contract(
        lambda x, n: call(module, x, n)[0],
        np.float32(x),
        LENGTHS,
        rows=(1,),
        out_length=lambda t: MelSubsampling.num_frames(t, kind),
    )
    frames = [MelSubsampling.num_frames(int(t), kind) for t in LENGTHS]
    np.testing.assert_array_equal(call(module, np.float32(x), LENGTHS)[1], frames)
    w = reference.parameters(module)
    for row, (t, n) in enumerate(zip(LENGTHS, frames, strict=True)):
        y = oracle(x[row, :t], MELS)
        for i in range(2):
            y = reference.conv(y, w[f"kernels.{i}"], stride=2) + w[f"biases.{i}"]
        assert len(y) == n
        np.testing.assert_allclose(out[row, :n], y, atol=5e-5)
        assert not out[row, n:].any()


@pytest.mark.parametrize(
    ("kind", "least", "of_a_second"), [("paper", 960, 24), ("fixed", 1360, 23)]
)
def test_number_of_frames(kind, least, of_a_second):
    assert MelSubsampling.num_frames(least - 1, kind) == 0
    assert MelSubsampling.num_frames(least, kind) == 1
    assert MelSubsampling.num_frames(16_000, kind) == of_a_second
    module = MelSubsampling(D, MELS, kind, SpecAugmentConfig(), rngs=nnx.Rngs(0))
    _, lengths = call(module, np.zeros((4, 2500), np.float32), np.array([0, 1, least - 1, least]))
    np.testing.assert_array_equal(lengths, [0, 0, 0, 1])


def test_only_fixed_augments():
    x, key = np.float32(audio()), jax.random.key(0)
    for kind in ("paper", "fixed"):
        module = MelSubsampling(D, MELS, kind, SHORT, rngs=nnx.Rngs(0))
        augmented, _ = module(x, LENGTHS, key)
        plain, _ = module(x, LENGTHS)
        assert bool((np.abs(augmented - plain) > 1e-4).any()) == (kind == "fixed")


def test_features_are_named():
    with pytest.raises(InputError, match="front_end is 'mfcc': choose paper or fixed"):
        MelSubsampling(D, MELS, "mfcc", SHORT, rngs=nnx.Rngs(0))
