"""Overlapped segments against the whole signal, and files of any rate, length and number of channels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx

from edgespeech.cli import main
from edgespeech.errors import InputError
from edgespeech.inference.enhance import enhance_file, overlapped_segments
from edgespeech.models.sepformer import SepFormer, SepFormerConfig
from tests.support.modules import randomize

SEGMENT, OVERLAP = 64, 16
RATE = 8000
ROUNDING = 2**-16 + 1e-6  # half a step of 16-bit samples


def audio(*shape, seed=0):
    return np.float32(0.1 * np.random.default_rng(seed).normal(size=shape))


def whole(process, x, sizes=(23, 1, 70, 5), segment=SEGMENT, overlap=OVERLAP):
    """The stream `[c t]` in blocks of some sizes, processed and put together; what was heard must be the input."""
    ends = np.cumsum(np.resize(sizes, 1 + x.shape[1]))
    blocks = np.split(x, ends[ends < x.shape[1]], axis=1)
    heard, made = zip(*overlapped_segments(process, blocks, segment, overlap), strict=True)
    np.testing.assert_array_equal(np.concatenate(heard, -1), x)
    return np.concatenate(made, -1)


def one_speaker(function):
    return lambda audio, lengths: function(audio)[:, None]


def filtered(x, taps):
    return np.stack([np.convolve(row, taps, "same") for row in x]).astype(np.float32)


# ------------------------------------------------------------------------------------- segments


@pytest.mark.parametrize("t", [1, 15, 63, 64, 65, 112, 113, 300])
def test_identity_has_no_seam(t):
    x = audio(2, t)
    np.testing.assert_allclose(whole(one_speaker(lambda a: a), x)[:, 0], x, atol=1e-8)


def test_a_filter_within_the_margin_gives_the_whole_signal():
    x = audio(1, 400)
    taps = np.random.default_rng(1).normal(
        size=2 * (OVERLAP // 4) + 1
    )  # reaches 4 samples each way
    got = whole(one_speaker(lambda a: filtered(a, taps)), x)[:, 0]
    np.testing.assert_allclose(got, filtered(x, taps), atol=1e-6)
    # and the margin is no larger than it is said to be
    taps = np.concatenate([[3.0], taps, [3.0]])
    got = whole(one_speaker(lambda a: filtered(a, taps)), x)[:, 0]
    assert np.abs(got - filtered(x, taps)).max() > 1e-4


def test_segments_that_disagree_fade_into_each_other():
    values = []

    def process(audio, lengths):
        values.append(float(len(values) % 2))
        return np.full((1, 1, SEGMENT), values[-1], np.float32)

    out = whole(process, audio(1, 400))[0, 0]
    assert len(values) == 8
    assert out.min() == 0.0
    assert out.max() == 1.0
    fade = OVERLAP - 2 * (OVERLAP // 4)
    # The steepest step of a raised cosine over `fade` samples.
    assert np.abs(np.diff(out)).max() <= 0.5 * np.pi / fade


def test_the_last_segment_is_filled_with_zeros_and_has_its_length():
    calls = []

    def process(audio, lengths):
        calls.append((audio.copy(), lengths.tolist()))
        return audio[:, None]

    x = audio(2, 100)
    whole(process, x)
    assert [lengths for _, lengths in calls] == [[64, 64], [52, 52]]
    np.testing.assert_array_equal(calls[1][0][:, :52], x[:, 48:])
    np.testing.assert_array_equal(calls[1][0][:, 52:], 0.0)


def test_memory_is_that_of_a_segment():
    """An endless stream gives results, and is never read further ahead than a segment and a block."""
    read = written = 0

    def endless():
        nonlocal read
        while True:
            read += 10
            yield audio(1, 10)

    segments = overlapped_segments(one_speaker(lambda a: a), endless(), SEGMENT, OVERLAP)
    for _, made in (next(segments) for _ in range(50)):
        written += made.shape[-1]
        assert made.shape[-1] <= SEGMENT
        assert read - written <= SEGMENT + 10


def test_speakers_keep_their_order():
    """The process swaps its two outputs at each call, one channel alone in every second one."""
    calls = 0

    def process(audio, lengths):
        nonlocal calls
        calls += 1
        both = np.stack([filtered(audio, [0.5, 0.5, 0]), filtered(audio, [0.5, -0.5, 0])], 1)
        both[0] = both[0, :: 1 if calls % 2 else -1]
        both[1] = both[1, :: 1 if calls % 3 else -1]
        return both

    x = audio(2, 400)
    out = whole(process, x)
    np.testing.assert_allclose(out[:, 0], filtered(x, [0.5, 0.5, 0]), atol=1e-6)
    np.testing.assert_allclose(out[:, 1], filtered(x, [0.5, -0.5, 0]), atol=1e-6)


@pytest.mark.parametrize("overlap", [0, 3, 33])
def test_an_overlap_that_does_not_fit(overlap):
    with pytest.raises(InputError, match=f"overlap of {overlap} samples"):
        whole(one_speaker(lambda a: a), audio(1, 100), overlap=overlap)


# ---------------------------------------------------------------------------------------- files


class Result(NamedTuple):
    estimates: jax.Array


class Model(nnx.Module):
    """Stands in for a SepFormer: `estimate_j = function_j(audio)`."""

    def __init__(self, *functions, sample_rate=RATE):
        self.config = SepFormerConfig(num_speakers=len(functions), sample_rate=sample_rate)
        self.functions = functions

    def __call__(self, audio, lengths):
        return Result(jnp.stack([function(audio) for function in self.functions], 1))


def enhance(model, path, *outputs, seconds=0.5, overlap=0.1):
    enhance_file(model, path, outputs, segment_seconds=seconds, overlap_seconds=overlap)
    return [soundfile.read(output, always_2d=True) for output in outputs]


def write(path, samples, rate=RATE):
    soundfile.write(path, samples, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    return path


def test_a_linear_model_gives_the_whole_file_at_the_level_of_the_source(tmp_path):
    x = audio(3 * RATE + 7, 2)
    taps = np.array([0.3, -0.2, 0.9])
    model = Model(lambda a: jax.vmap(lambda row: jnp.convolve(row, -0.01 * taps, mode="same"))(a))
    [(got, rate)] = enhance(model, write(tmp_path / "x.wav", x), tmp_path / "y.wav")
    assert rate == RATE
    y = filtered(x.T, taps).T
    want = y * np.vdot(x, y) / np.vdot(y, y)
    np.testing.assert_allclose(got, want, atol=ROUNDING)


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_any_rate_in_the_same_out(tmp_path, rate):
    time = np.arange(2 * rate + 11) / rate
    x = np.stack([0.3 * np.sin(2 * np.pi * f * time) for f in (440, 1000)], 1)
    source = write(tmp_path / "x.flac", x, rate)
    [(got, out_rate)] = enhance(Model(lambda a: 2.0 * a), source, tmp_path / "y.flac")
    assert (out_rate, got.shape) == (rate, x.shape)
    inside = slice(rate // 50, -rate // 50)  # the tones start and stop at once: that is above 4 kHz
    np.testing.assert_allclose(got[inside], x[inside], atol=2e-4)


def test_two_speakers_go_to_two_files(tmp_path):
    x = audio(RATE, 1)
    functions = [
        lambda a: jnp.diff(a, prepend=0.0),
        lambda a: 3.0 * (a - 0.5 * jnp.diff(a, prepend=0.0)),
    ]
    paths = tmp_path / "a.wav", tmp_path / "b.flac"
    results = enhance(Model(*functions), write(tmp_path / "x.wav", x), *paths)
    for (got, _), function in zip(results, functions, strict=True):
        y = np.asarray(function(x.T)).T
        want = y * np.vdot(x, y) / np.vdot(y, y)
        # where segments start, `diff` lacks a sample: the margin keeps that out
        np.testing.assert_allclose(got, want, atol=ROUNDING)


def test_a_peak_stays_within_1(tmp_path):
    x = audio(RATE, 1)
    model = Model(lambda a: a.at[:, 100].set(5.0))
    [(got, _)] = enhance(model, write(tmp_path / "x.wav", x), tmp_path / "y.wav", seconds=2)
    assert np.abs(got).max() == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(got[:100], x[:100] / 5, atol=ROUNDING)


def test_silence_stays_silent(tmp_path):
    source = write(tmp_path / "x.wav", np.zeros((900, 1)))
    [(got, _)] = enhance(Model(lambda a: a), source, tmp_path / "y.wav")
    np.testing.assert_array_equal(got, np.zeros((900, 1)))


def test_a_sepformer_on_a_short_file_gives_what_it_gives_alone(tmp_path):
    config = SepFormerConfig(
        num_filters=12, width=8, kernel_size=8, chunk_length=6, num_blocks=1, num_intra_layers=1, num_inter_layers=1,
        num_heads=2, ffn_width=8,
    )  # fmt: skip
    model = randomize(SepFormer(config, rngs=nnx.Rngs(0)), scale=0.2)
    x = audio(301, 1)
    [(got, _)] = enhance(
        model, write(tmp_path / "x.wav", x), tmp_path / "y.wav", seconds=0.05, overlap=0.01
    )
    alone = np.asarray(jax.jit(lambda x: model(x, jnp.array([301])).estimates[0, 0])(x.T))
    want = alone * np.vdot(x, alone) / np.vdot(alone, alone)
    np.testing.assert_allclose(got[:, 0], want / max(1, np.abs(want).max()), atol=ROUNDING)


def test_the_command_takes_speechbrains_folder(tmp_path, monkeypatch, capsys):
    model, (noisy, clean) = Model(lambda a: a), (tmp_path / "x.wav", tmp_path / "y.wav")
    monkeypatch.setattr("edgespeech.models.sepformer.SepFormer", Model)
    monkeypatch.setattr(
        "edgespeech.interop.speechbrain_sepformer.load_speechbrain_sepformer",
        {tmp_path: model}.__getitem__,
    )
    x = audio(900, 1)
    arguments = ["enhance", str(write(noisy, x)), str(clean), f"--model={tmp_path}"]
    assert main(arguments) == 2
    assert (
        "model.json is missing: name a folder that holds a saved model" in capsys.readouterr().err
    )
    (tmp_path / "masknet.ckpt").touch()
    assert main(arguments) == 0
    np.testing.assert_allclose(soundfile.read(clean)[0], x[:, 0], atol=ROUNDING)


def test_faults_are_named_before_anything_is_written(tmp_path):
    model, good = Model(lambda a: a), write(tmp_path / "x.wav", audio(900, 1))
    out = tmp_path / "y.wav"
    with pytest.raises(InputError, match="2 output files for a model of 1 speakers"):
        enhance_file(model, good, [out, out])
    with pytest.raises(InputError, match=r"y\.doc cannot hold 1 channels at 8000 Hz"):
        enhance_file(model, good, [tmp_path / "y.doc"])
    with pytest.raises(InputError, match=r"none\.wav: unreadable audio \(no such file\)"):
        enhance_file(model, tmp_path / "none.wav", [out])
    with pytest.raises(InputError, match="no samples"):
        enhance_file(model, write(tmp_path / "empty.wav", np.zeros((0, 1))), [out])
    for segment, overlap in ((0.5, 0.3), (8.0, 0.0), (np.nan, 1.0), (np.inf, 1.0)):
        with pytest.raises(InputError, match=f"overlap of {overlap:g} s does not fit segments of"):
            enhance(model, good, out, seconds=segment, overlap=overlap)
    samples = audio(900, 1)
    samples[700] = np.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        enhance_file(model, write(tmp_path / "nan.wav", samples), [out])
    assert not out.exists()
