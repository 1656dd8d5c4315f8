import hashlib
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from edgespeech.data import synthetic
from edgespeech.data.synthetic import SPLITS, Job, SyntheticConfig, SyntheticCorpus, plan
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError

TINY = SyntheticConfig(num_train=12, num_dev=3, num_test=4, seed=5)


def digest(corpus):
    return hashlib.sha256(
        b"".join(corpus.audio(i).tobytes() for i in range(len(corpus)))
    ).hexdigest()


def test_default_splits_share_no_voice_and_no_sentence_and_train_covers_the_words():
    jobs = {split: plan(split, SyntheticConfig()) for split in SPLITS}
    assert [len(jobs[split]) for split in SPLITS] == [14400, 100, 200]
    texts = {split: [job.text for job in jobs[split]] for split in SPLITS}
    for a, b in [("train", "dev"), ("train", "test"), ("dev", "test")]:
        assert not set(texts[a]) & set(texts[b])
    for split in ("dev", "test"):
        assert len(set(texts[split])) == len(texts[split])
    voices = {split: {job.voice for job in jobs[split]} for split in SPLITS}
    variants = {split: {voice.split("+")[1] for voice in voices[split]} for split in SPLITS}
    for a, b in [("train", "dev"), ("train", "test"), ("dev", "test")]:
        assert not voices[a] & voices[b]
        assert not variants[a] & variants[b]
    assert [len(voices[split]) for split in SPLITS] == [112, 12, 16]
    heard = Counter(word for job in jobs["train"] for word in job.text.split())
    needed = {word for split in ("dev", "test") for job in jobs[split] for word in job.text.split()}
    assert min(heard[word] for word in needed) >= 50
    assert not any(CharTokenizer().can_encode(text) for part in texts.values() for text in part)


def test_the_test_split_does_not_change_with_the_training_set():
    assert plan("test", SyntheticConfig(num_train=10)) == plan("test", SyntheticConfig())
    assert plan("test", SyntheticConfig(seed=1)) != plan("test", SyntheticConfig())


def test_the_audio_is_speech_of_sane_length_level_and_noise(tmp_path):
    corpus = SyntheticCorpus("train", TINY, tmp_path)
    assert (corpus.kind, corpus.name, len(corpus)) == ("synthetic", "synthetic-train", 12)
    for index, utterance in enumerate(corpus.utterances):
        audio = corpus.audio(index)
        assert audio.dtype == np.float32
        assert len(audio) == utterance.num_samples
        seconds, words = len(audio) / 16000, len(utterance.text.split())
        assert 0.15 * words < seconds < 0.7 * words + 0.5
        assert 10 ** (-12.5 / 20) < np.abs(audio).max() < 10 ** (-1.5 / 20)
        noise = np.concatenate([audio[:1500], audio[-1500:]])
        ratio = 10 * np.log10(np.mean(audio**2) / np.mean(noise**2))
        assert 29 < ratio < 41
        # speech is louder below 4 kHz than above, and comes and goes
        spectrum = np.abs(np.fft.rfft(audio)) ** 2
        assert spectrum[: len(spectrum) // 2].sum() > 10 * spectrum[len(spectrum) // 2 :].sum()
        frames = audio[: len(audio) // 320 * 320].reshape(-1, 320).std(axis=1)
        assert np.percentile(frames, 90) > 5 * np.percentile(frames, 10)


def test_every_voice_is_different_and_none_clips():
    voices = [
        f"{accent}+{variant}"
        for split in SPLITS
        for variant in synthetic.VARIANTS[split]
        for accent in synthetic.ACCENTS
    ]
    rate, spoken = synthetic._synthesise(
        [Job("PLEASE CALL PETER AT SEVEN THIRTY", voice, 50, 50, 170) for voice in voices]
    )
    assert rate == 22050
    assert len({audio.tobytes() for audio in spoken}) == len(voices) == 140
    assert max(int(np.abs(audio.astype(int)).max()) for audio in spoken) < 32768
    assert min(int(np.abs(audio.astype(int)).max()) for audio in spoken) > 3000


def test_pitch_and_rate_do_what_they_say():
    jobs = [
        Job("THE BLUE MOUSE RUNS", "en-us+m3", pitch, 0, rate)
        for pitch, rate in [(20, 150), (80, 150), (20, 250)]
    ]
    rate, (low, high, fast) = synthetic._synthesise(jobs)

    def pitch_of(audio):
        found = []
        for start in range(0, len(audio) - 2048, 512):
            frame = audio[start : start + 2048].astype(float)
            correlation = np.correlate(frame, frame, "full")[2047:]
            lag = 110 + correlation[110:450].argmax()  # 50 to 200 Hz
            if correlation[lag] > 0.5 * correlation[0] > 0:
                found.append(rate / lag)
        return np.median(found)

    assert pitch_of(high) > 1.3 * pitch_of(low)
    assert len(fast) < 0.75 * len(low)


def test_the_same_bytes_in_a_fresh_process_and_after_other_splits(tmp_path):
    SyntheticCorpus("dev", TINY, tmp_path / "a")
    here = SyntheticCorpus("train", TINY, tmp_path / "a")
    code = (
        "import sys\n"
        "from edgespeech.data.synthetic import SyntheticConfig, SyntheticCorpus\n"
        f"corpus = SyntheticCorpus('train', {TINY!r}, {str(tmp_path / 'b')!r})\n"
        "for i in range(len(corpus)): sys.stdout.buffer.write(corpus.audio(i).tobytes())\n"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert hashlib.sha256(there).hexdigest() == digest(here)


def test_the_cache_is_used_keyed_and_repaired(tmp_path, monkeypatch):
    first = SyntheticCorpus("test", TINY, tmp_path)
    (file,) = (tmp_path / "synthetic").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "_synthesise", None)
        again = SyntheticCorpus("test", TINY, tmp_path)
        assert (again.utterances, again.notes, digest(again)) == (
            first.utterances,
            (),
            digest(first),
        )
    content = bytearray(file.read_bytes())
    for damaged in (content[:1000], b"", bytes(content[:5000] + b"\xff\x00" + content[5002:])):
        file.write_bytes(damaged)
        repaired = SyntheticCorpus("test", TINY, tmp_path)
        assert "damaged" in repaired.notes[0]
        assert digest(repaired) == digest(first)
        assert file.read_bytes() == bytes(content)
    other = SyntheticConfig(num_train=12, num_dev=3, num_test=4, seed=6)
    assert digest(SyntheticCorpus("test", other, tmp_path)) != digest(first)
    assert len(list((tmp_path / "synthetic").iterdir())) == 2


def test_an_unwritable_cache_is_a_note(tmp_path):
    (tmp_path / "synthetic").write_text("a file where the folder should be")
    corpus = SyntheticCorpus("dev", TINY, tmp_path)
    assert len(corpus) == 3
    assert any("could not be kept" in note for note in corpus.notes)


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no split 'validation'.*train, dev, test"):
        SyntheticCorpus("validation", TINY, tmp_path)
    with pytest.raises(InputError, match="num_dev is 0"):
        SyntheticConfig(num_dev=0)
    with pytest.raises(InputError, match="seed is -1"):
        SyntheticConfig(seed=-1)
    for voice in ("en-us+nobody", "xx-none+m1"):
        with pytest.raises(InputError, match=re.escape(f"voice {voice!r}")):
            synthetic._synthesise([Job("HELLO", voice, 50, 50, 170)])
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(InputError, match="pip install espeakng_loader"):
        SyntheticCorpus("dev", TINY, tmp_path)
