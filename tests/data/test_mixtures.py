"""Mixtures: their ratios, their seeds, their rooms, and the batches that hold them."""

import dataclasses

import numpy as np
import pytest
import soundfile

from edgespeech.data.batching import BatchConfig
from edgespeech.data.mixtures import Excerpts, MixtureConfig, MixtureSource
from edgespeech.data.noise import FolderNoise, GeneratedNoise
from edgespeech.errors import InputError
from tests.support.tiny import ToneCorpus

RATE = 16_000
BATCHES = BatchConfig(batch_seconds=2.3, num_buckets=1)


def random(seed=0):
    return np.random.default_rng(seed)


DEFAULT = MixtureConfig()


def source(config=DEFAULT, noise=None, batches=BATCHES):
    corpus = ToneCorpus()
    return MixtureSource(corpus, noise or GeneratedNoise(corpus), config, batches)


def best_match(utterance, voice):
    """Largest correlation coefficient of a voice with the stretches of an utterance, either the longer one."""
    short, long = sorted((np.float64(utterance), np.float64(voice)), key=len)
    windows = np.lib.stride_tricks.sliding_window_view(long, len(short))
    norms = np.linalg.norm(windows, axis=1) * np.linalg.norm(short)
    return (windows @ short / np.maximum(norms, 1e-9)).max()


def db(signal, noise):
    return 10 * np.log10(np.sum(np.float64(signal) ** 2) / np.sum(np.float64(noise) ** 2))


# ------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("kind", ["coloured", "babble", "hum", "clicks"])
@pytest.mark.parametrize("snr", [-5.0, 12.5])
def test_every_noise_has_the_ratio_that_was_asked_for(kind, snr):
    corpus = ToneCorpus()
    mixtures = source(MixtureConfig(snr_db=(snr,)), GeneratedNoise(corpus, [kind]))
    for index in range(3):
        speech = corpus.audio(index)
        mixture = mixtures.mix(speech, index, epoch=0)
        assert mixture.snr_db == snr
        assert db(mixture.targets[0], mixture.noisy - mixture.targets[0]) == pytest.approx(
            snr, abs=1e-3
        )
        # One gain for everything, and only where the sum would leave [-1, 1].
        gain = np.vdot(mixture.targets[0], speech) / np.vdot(speech, speech)
        np.testing.assert_allclose(mixture.targets[0], gain * speech, atol=1e-6)
        peak = max(np.abs(mixture.noisy).max(), np.abs(mixture.targets).max())
        assert peak <= 1.0
        assert gain == pytest.approx(1.0) or (gain < 1.0 and peak == pytest.approx(1.0))


def test_a_mixture_is_a_function_of_seed_epoch_and_index():
    speech = ToneCorpus().audio(1)
    first = source().mix(speech, 1, 3)
    again = source().mix(speech, 1, 3)
    np.testing.assert_array_equal(first.noisy, again.noisy)
    others = [source().mix(speech, 1, 4), source().mix(speech, 2, 3)]
    others.append(source(MixtureConfig(seed=1)).mix(speech, 1, 3))
    assert all(np.abs(first.noisy - other.noisy).max() > 1e-3 for other in others)


def test_every_ratio_is_drawn():
    mixtures, speech = source(MixtureConfig(snr_db=(0.0, 10.0, 20.0))), ToneCorpus().audio(0)
    drawn = [mixtures.mix(speech, 0, epoch).snr_db for epoch in range(90)]
    assert [drawn.count(snr) > 15 for snr in (0.0, 10.0, 20.0)] == [True] * 3


def test_two_speakers_within_their_levels():
    mixtures = source(MixtureConfig(num_speakers=2, snr_db=(100.0,)))
    corpus, levels = mixtures.corpus, []
    for epoch in range(30):
        mixture = mixtures.mix(corpus.audio(0), 0, epoch)
        assert mixture.targets.shape == (2, len(corpus.audio(0)))
        levels.append(db(mixture.targets[1], mixture.targets[0]))
        np.testing.assert_allclose(mixture.targets.sum(0), mixture.noisy, atol=2e-4)
        if epoch > 2:
            continue
        others = [corpus.audio(i) for i, u in enumerate(corpus.utterances) if u.speaker == "2"]
        assert max(best_match(other, mixture.targets[1]) for other in others) > 0.9999
    assert -2.5 <= min(levels) < -1.5
    assert 1.5 < max(levels) <= 2.5


def test_rooms_and_what_the_target_is():
    speech = ToneCorpus().audio(0)
    config = MixtureConfig(reverberation=1.0, snr_db=(200.0,))
    wet = source(config).mix(speech, 0, 0)
    np.testing.assert_allclose(wet.noisy, wet.targets[0], atol=1e-6)
    assert np.abs(wet.targets[0] - speech).max() > 0.01
    dry = source(dataclasses.replace(config, dereverberate=True)).mix(speech, 0, 0)
    gain = np.vdot(dry.targets[0], speech) / np.vdot(speech, speech)
    np.testing.assert_allclose(dry.targets[0], gain * speech, atol=1e-6)
    unit = [mixture.noisy / np.linalg.norm(mixture.noisy) for mixture in (wet, dry)]
    np.testing.assert_allclose(*unit, atol=1e-6)


def test_silent_speech_gets_quiet_noise():
    mixture = source(MixtureConfig(snr_db=(0.0,))).mix(np.zeros(4000, np.float32), 0, 0)
    np.testing.assert_array_equal(mixture.targets, 0.0)
    assert np.sqrt(np.mean(mixture.noisy**2)) == pytest.approx(1e-3, rel=1e-4)


# -------------------------------------------------------------------------------------- batches


def test_batches_hold_the_mixtures_of_their_rows():
    mixtures = source()
    assert mixtures.steps_in_epoch(0) == 2
    seen = []
    for step, batch in mixtures.iterator(0, 4):
        epoch, _ = mixtures.locate(step)
        assert batch.audio.shape == (4, mixtures.shapes[0].t)
        for row, index in enumerate(batch.index):
            length = batch.audio_lengths[row]
            if index < 0:  # filler
                assert batch.weights[row] == 0 == np.abs(batch.audio[row]).max()
                continue
            want = mixtures.mix(mixtures.corpus.audio(index), index, epoch)
            np.testing.assert_array_equal(batch.audio[row, :length], want.noisy)
            np.testing.assert_array_equal(batch.targets[row, :, :length], want.targets)
            np.testing.assert_array_equal(batch.audio[row, length:], 0.0)
            seen.append(index)
    assert sorted(seen) == sorted([*range(6)] * 2)


def test_evaluation_is_the_same_each_time():
    first, again = ([*source().eval_batches()] for _ in range(2))
    assert sorted(i for batch in first for i in batch.index if i >= 0) == list(range(6))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.audio, b.audio)


def test_hosts_share_a_batch():
    batches = dataclasses.replace(BATCHES, batch_multiple=2)
    whole = source(batches=batches)
    parts = [whole.host_slice(host, 2).batch(0) for host in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([p.audio for p in parts]), whole.batch(0).audio)


def test_excerpts_cover_every_sample_once():
    corpus = ToneCorpus()
    pieces = Excerpts(corpus, 0.2)
    assert max(u.num_samples for u in pieces.utterances) <= 3200
    assert len({u.id for u in pieces.utterances}) == len(pieces) > len(corpus)
    joined = np.concatenate([pieces.audio(i) for i in range(len(pieces))])
    np.testing.assert_array_equal(joined, np.concatenate([corpus.audio(i) for i in range(6)]))
    assert all(len(pieces.audio(i)) == u.num_samples for i, u in enumerate(pieces.utterances))
    assert [(u.id, u.speaker) for u in pieces.utterances[:3]] == [
        ("1-1-0000.0", "1"),
        ("1-1-0000.1", "1"),
        ("2-1-0001.0", "2"),
    ]
    with pytest.raises(InputError, match="excerpts of 0 s"):
        Excerpts(corpus, 0)


def test_mixing_with_a_folder(tmp_path):
    soundfile.write(tmp_path / "n.wav", 0.1 * random().normal(size=8000), RATE)
    mixtures = source(MixtureConfig(snr_db=(3.0,)), FolderNoise(tmp_path))
    mixture = mixtures.mix(mixtures.corpus.audio(0), 0, 0)
    assert db(mixture.targets[0], mixture.noisy - mixture.targets[0]) == pytest.approx(
        3.0, abs=1e-3
    )


def test_noise_that_stays_silent_is_refused(tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), RATE)
    with pytest.raises(InputError, match="8 draws of noise were all silent"):
        source(noise=FolderNoise(tmp_path)).mix(np.ones(400, np.float32), 0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_speakers", 3),
        ("snr_db", ()),
        ("snr_db", (float("nan"),)),
        ("reverberation", 1.5),
        ("rt60", (0.6, 0.2)),
        ("rt60", (0.0, 0.2)),
        ("seed", -1),
    ],
)
def test_bad_settings(field, value):
    with pytest.raises(InputError, match=f"{field} is"):
        MixtureConfig(**{field: value})
