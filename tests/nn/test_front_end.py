"""Both front ends against float64 NumPy, their lengths, and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.nn import front_end as module
from edgespeech.nn.front_end import WAV2VEC2_STRIDES, LogMelFrontEnd, WaveformFrontEnd
from edgespeech.ops.features import SpecAugmentConfig
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.modules import randomize

AUGMENT = SpecAugmentConfig(frequency_width=4, time_mask_rate=0.1, time_width=4)
MELS, STRIDES, BLOCKS = 10, 2, 2
call = nnx.jit(lambda front_end, audio, lengths: front_end(audio, lengths)[0])
lengths_of = nnx.jit(lambda front_end, audio, lengths: front_end(audio, lengths)[1])


def waveform():
    return randomize(WaveformFrontEnd(4, rngs=nnx.Rngs(0)))


def logmel():
    return randomize(LogMelFrontEnd(6, MELS, STRIDES, BLOCKS, AUGMENT, rngs=nnx.Rngs(0)))


def audio(lengths, seed=1):
    x = 0.1 * np.random.default_rng(seed).normal(size=(len(lengths), max(lengths))) + 0.02
    return np.float32(x), jnp.array(lengths)


@pytest.mark.parametrize("chunk", [1, 2, 5, 200])
def test_waveform_front_end(monkeypatch, chunk):
    """Five frames in chunks of one, two with an odd one left, all, and fewer than a chunk holds."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    front_end = waveform()
    x, lengths = audio((2000, 1380, 400))
    frames = WaveformFrontEnd.num_frames
    out = padding_contract(
        lambda x, n: call(front_end, x, n), x, lengths, rows=(1,), out_length=frames
    )
    w = reference.parameters(front_end)
    for row, t in enumerate((2000, 1380, 400)):
        want = reference.waveform_front_end(w, np.float64(x[row, :t]), WAV2VEC2_STRIDES)
        assert len(want) == frames(t)
        np.testing.assert_allclose(out[row, : frames(t)], want, atol=2e-5)


def test_logmel_front_end():
    front_end = logmel()
    x, lengths = audio((4000, 2900, 1600))

    def frames(t):
        return LogMelFrontEnd.num_frames(t, STRIDES)

    out = padding_contract(
        lambda x, n: call(front_end, x, n), x, lengths, rows=(1,), out_length=frames
    )
    w = reference.parameters(front_end)
    for row, t in enumerate((4000, 2900, 1600)):
        alone = np.float64(x[row, :t])
        want = reference.logmel_front_end(w, alone, MELS, STRIDES, BLOCKS)
        assert len(want) == frames(t)
        np.testing.assert_allclose(out[row, : frames(t)], want, atol=2e-4)
        np.testing.assert_array_equal(out[row, frames(t) :], 0.0)


@pytest.mark.parametrize("make", [waveform, logmel])
def test_lengths_agree_with_num_frames(make):
    front_end = make()
    sizes = (3000, 0, 1, 399, 400, 719, 720, 1039, 1040, 1279, 1280, 2079, 2080)
    got = lengths_of(front_end, *audio(sizes))
    extra = () if make is waveform else (STRIDES,)
    assert [int(n) for n in got] == [front_end.num_frames(t, *extra) for t in sizes]


@pytest.mark.parametrize(
    ("num_strides", "seconds", "frames"), [(2, 10, 248), (3, 10, 123), (2, 0.04, 0)]
)
def test_logmel_frames_are_of_40_and_80_ms(num_strides, seconds, frames):
    assert LogMelFrontEnd.num_frames(int(16_000 * seconds), num_strides) == frames


@pytest.mark.parametrize("make", [waveform, logmel])
def test_too_short_an_utterance_stays_finite_and_leaves_the_others(make):
    front_end = make()
    x, lengths = audio((1700, 300))

    @nnx.jit
    def value_and_grad(front_end, x, lengths):
        def loss(front_end, x):
            out, n = front_end(x, lengths)
            valid = jnp.arange(out.shape[1])[None] < n[:, None]
            return jnp.sum(jnp.where(valid[..., None], out, 0.0) ** 2)

        return nnx.value_and_grad(loss, argnums=(0, 1))(front_end, x)

    value, (params, x_grad) = value_and_grad(front_end, x, lengths)
    alone, (params_alone, x_alone) = value_and_grad(front_end, x[:1], lengths[:1])
    assert float(value) == pytest.approx(float(alone), rel=1e-6)
    got, want = reference.parameters_of_state(params), reference.parameters_of_state(params_alone)
    for name, grad in want.items():
        np.testing.assert_allclose(got[name], grad, rtol=1e-4, atol=1e-4 * np.abs(grad).max())
    np.testing.assert_allclose(x_grad[:1], x_alone, atol=1e-4 * np.abs(x_alone).max())
    np.testing.assert_array_equal(x_grad[1], 0.0)


def test_amplitude_and_offset_of_the_waveform_do_not_matter():
    front_end = waveform()
    x, lengths = audio((1700, 1400))
    out, louder = call(front_end, x, lengths), call(front_end, 5.0 * x + 0.3, lengths)
    n = WaveformFrontEnd.num_frames(1400)
    # Up to the 1e-7 that is added to the variance of 0.01.
    np.testing.assert_allclose(louder[:, :n], out[:, :n], atol=5e-5)


def test_key_augments_the_logmel_front_end_only():
    x, lengths = audio((4000, 2900))
    augmented = nnx.jit(lambda front_end, x, n, key: front_end(x, n, key)[0])
    key = jax.random.key(0)
    plain, front_end = waveform(), logmel()
    np.testing.assert_array_equal(augmented(plain, x, lengths, key), call(plain, x, lengths))
    out = augmented(front_end, x, lengths, key)
    np.testing.assert_array_equal(out, augmented(front_end, x, lengths, key))
    assert np.abs(np.asarray(out - call(front_end, x, lengths))).max() > 1e-2
