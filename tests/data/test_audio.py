import io
from fractions import Fraction

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from edgespeech import types
from edgespeech.data import audio
from edgespeech.data.audio import (
    change_speed,
    from_int16,
    read_audio,
    read_int16,
    speed_length,
    to_int16,
)
from edgespeech.errors import InputError


def tone(seconds, hertz, rate, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def frequency(samples):
    """Peak of the spectrum in Hz, to the resolution of the transform."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * 16000 / len(samples)


def test_the_sample_rate_is_that_of_the_legend():
    assert audio.SAMPLE_RATE == types.SAMPLE_RATE


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_int16_files_come_back_exactly(tmp_path, suffix):
    samples = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, samples, 16000, subtype="PCM_16")
    recording = read_audio(path)
    assert recording.samples.dtype == np.float32
    np.testing.assert_array_equal(recording.samples, samples / 32768)
    assert (recording.channels, recording.rate) == (1, 16000)


@pytest.mark.parametrize(
    ("suffix", "subtype", "rate", "channels"),
    [
        ("wav", "PCM_16", 16000, 1),
        ("flac", "PCM_16", 16000, 1),
        ("flac", "PCM_24", 16000, 1),
        ("wav", "FLOAT", 16000, 1),
        ("flac", "PCM_16", 8000, 1),
        ("flac", "PCM_16", 16000, 2),
        ("ogg", "OPUS", 48000, 1),
    ],
)
def test_integers_are_those_by_way_of_floats(tmp_path, suffix, subtype, rate, channels):
    noise = np.random.default_rng(1).uniform(-1.0, 1.0, (4000, channels))
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise, rate, subtype=subtype)
    expected = to_int16(read_audio(path).samples)
    for file in (path, io.BytesIO(path.read_bytes())):
        found = read_int16(file)
        assert found.dtype == np.int16
        np.testing.assert_array_equal(found, expected)


def test_faults_are_named_on_the_short_way_too(tmp_path):
    path = tmp_path / "a.flac"
    noise = np.random.default_rng(1).integers(-9000, 9000, 40_000).astype(np.int16)
    soundfile.write(path, noise, 16000)
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], content[:20], b""):
        path.write_bytes(broken)
        with pytest.raises(InputError) as long:
            read_audio(path)
        with pytest.raises(InputError) as short:
            read_int16(path)
        assert str(short.value) == str(long.value)
    with pytest.raises(InputError, match="clip: unreadable"):
        read_int16(io.BytesIO(b"no audio"), "clip")


def test_stereo_becomes_the_mean_of_its_channels(tmp_path):
    samples = np.random.default_rng(0).integers(-9000, 9000, (4000, 2)).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    recording = read_audio(tmp_path / "a.wav")
    assert recording.channels == 2
    np.testing.assert_allclose(recording.samples, samples.mean(axis=1) / 32768, atol=1e-7)


def test_another_rate_is_resampled(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1.0, 440, 44100), 44100, subtype="FLOAT")
    recording = read_audio(tmp_path / "a.wav")
    assert (recording.rate, len(recording.samples)) == (44100, 16000)
    expected = tone(1.0, 440, 16000)
    np.testing.assert_allclose(recording.samples[500:-500], expected[500:-500], atol=2e-4)


@pytest.mark.parametrize(("format", "subtype"), [("OGG", "OPUS"), ("OGG", "VORBIS"), ("MP3", None)])
def test_lossy_formats_decode(format, subtype):
    file = io.BytesIO()
    samples = to_int16(tone(1.0, 440, 16000))
    soundfile.write(file, samples, 16000, format=format, subtype=subtype)
    file.seek(0)
    samples = read_audio(file, name="memory").samples
    assert frequency(samples) == pytest.approx(440, abs=2)
    # the encoder of libsndfile damages the last frame of an Opus file
    assert np.abs(samples[1000:-1000]).max() == pytest.approx(0.5, abs=0.03)


def test_overshoot_is_clipped(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.asarray([0.5, 1.25, -1.5]), 16000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav").samples, [0.5, 1.0, -1.0])


def test_faults_name_the_file(tmp_path):
    def wav(name, samples):
        soundfile.write(tmp_path / name, np.asarray(samples), 16000, subtype="FLOAT")

    wav("empty.wav", [])
    wav("nan.wav", [0.0, np.nan, np.inf])
    wav("loud.wav", [0.0, 31000.0])
    (tmp_path / "text.flac").write_text("not audio")
    soundfile.write(tmp_path / "whole.flac", tone(2.0, 300, 16000), 16000)
    whole = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    for name, reason in {
        "empty.wav": "zero-length",
        "nan.wav": "2 NaN or infinite",
        "loud.wav": "amplitude reaches 31000",
        "text.flac": "unreadable",
        "cut.flac": "unreadable|truncated",
        "missing.wav": "unreadable",
    }.items():
        with pytest.raises(InputError, match=f"{name}: .*({reason})"):
            read_audio(tmp_path / name)


def test_int16_round_trip_is_exact_for_every_value():
    values = np.arange(-32768, 32768).astype(np.int16)
    np.testing.assert_array_equal(to_int16(from_int16(values)), values)
    np.testing.assert_array_equal(to_int16(np.asarray([1.0, -1.0])), [32767, -32768])


@settings(deadline=None)
@given(st.integers(1, 10**6), st.sampled_from([0.5, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 2.0]))
def test_speed_length_is_the_exact_ceiling(n, factor):
    ratio = Fraction(str(factor))
    expected = -((-n * ratio.denominator) // ratio.numerator)
    assert speed_length(n, factor) == expected
    np.testing.assert_array_equal(speed_length(np.asarray([n, n]), factor), [expected] * 2)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40_000), st.sampled_from([0.5, 0.9, 0.95, 1.05, 1.1, 2.0]))
def test_change_speed_has_the_length_of_speed_length(n, factor):
    assert len(change_speed(np.zeros(n, np.float32), factor)) == speed_length(n, factor)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_change_speed_is_resampling(factor):
    samples = tone(1.0, 440, 16000).astype(np.float32)
    changed = change_speed(samples, factor)
    expected = tone(1.0 / factor, 440 * factor, 16000)[: len(changed)]
    middle = slice(500, len(expected) - 500)
    np.testing.assert_allclose(changed[middle], expected[middle], atol=2e-4)


def test_speed_one_changes_nothing():
    samples = np.random.default_rng(0).uniform(-1, 1, 100).astype(np.float32)
    assert change_speed(samples, 1.0) is samples
