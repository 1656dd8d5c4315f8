import threading
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgespeech.data.audio import change_speed
from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.data.corpus import Corpus, Utterance
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from tests.support.waiting import PATIENCE, wait_for

TOKENIZER = CharTokenizer()


class Noises(Corpus):
    """Utterance i is noise of the given length seeded by i; its text has i % 5 + 1 letters."""

    kind = "folder"
    name = "noises"

    def __init__(self, lengths, texts=None):
        texts = texts or ["ABCDE"[: i % 5 + 1] for i in range(len(lengths))]
        self.utterances = tuple(
            Utterance(f"u{i}", "s", text, length)
            for i, (length, text) in enumerate(zip(lengths, texts, strict=True))
        )

    def audio(self, index):
        random = np.random.default_rng(index)
        return random.uniform(-1, 1, self.utterances[index].num_samples).astype(np.float32)


corpora = st.lists(st.integers(200, 30_000), min_size=1, max_size=30).map(Noises)
configs = st.builds(
    BatchConfig,
    batch_seconds=st.sampled_from([16.0, 20.0, 40.0]),
    num_buckets=st.integers(1, 5),
    speed_factors=st.sampled_from([(1.0,), (0.9, 1.0, 1.1)]),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
    batch_multiple=st.sampled_from([1, 2, 4]),
)
quick = settings(deadline=None, max_examples=100)


def epoch_of(source, epoch):
    first = sum(source.steps_in_epoch(e) for e in range(epoch))
    return [source.batch(first + i) for i in range(source.steps_in_epoch(epoch))]


def equal(a, b):
    for left, right in zip(a, b, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@quick
@given(corpora, configs, st.integers(0, 2))
def test_an_epoch_holds_every_utterance_once_with_its_audio_and_text(corpus, config, epoch):
    source = BatchSource(corpus, TOKENIZER, config)
    seen = []
    for batch in epoch_of(source, epoch):
        rows, t = batch.audio.shape
        assert (t, rows, batch.targets.shape[1]) in source.shapes
        assert rows % config.batch_multiple == 0
        assert t % 1280 == 0
        assert rows * t <= config.batch_seconds * 16000
        for row, index in enumerate(batch.index):
            samples, tokens = batch.audio_lengths[row], batch.target_lengths[row]
            assert not batch.audio[row, samples:].any()
            assert not batch.targets[row, tokens:].any()
            if index < 0:
                assert (samples, tokens, batch.weights[row]) == (t, 0, 0)
                assert not batch.audio[row].any()
                continue
            seen.append(int(index))
            assert batch.weights[row] == 1
            utterance = corpus.utterances[index]
            expected = {
                -((-utterance.num_samples * f.denominator) // f.numerator): float(f)
                for f in (Fraction(str(factor)) for factor in config.speed_factors)
            }
            np.testing.assert_array_equal(
                batch.audio[row, :samples], change_speed(corpus.audio(index), expected[samples])
            )
            assert TOKENIZER.decode(batch.targets[row, :tokens]) == utterance.text
        dtypes = [array.dtype.name for array in batch]
        assert dtypes == ["float32", "int32", "int32", "int32", "float32", "int32"]
    assert sorted(seen) == list(range(len(corpus)))
    assert len(source.shapes) <= config.num_buckets


@quick
@given(corpora, configs, st.integers(0, 12), st.integers(0, 4))
def test_resuming_anywhere_equals_the_unbroken_run(corpus, config, start, threads):
    unbroken = BatchSource(corpus, TOKENIZER, config).iterator(0, start + 3)
    resumed = BatchSource(corpus, TOKENIZER, config).iterator(start, 3, threads, prefetch=3)
    for (step, whole), (other, part) in zip(islice(unbroken, start, None), resumed, strict=True):
        assert step == other
        equal(whole, part)


@quick
@given(corpora, configs, st.sampled_from([2, 4]), st.integers(0, 8))
def test_hosts_see_equal_shapes_and_their_rows_are_the_whole_batch(corpus, config, hosts, step):
    whole = BatchSource(corpus, TOKENIZER, config)
    if config.batch_multiple % hosts:
        with pytest.raises(InputError, match=f"of {hosts}; the fix: set batch_multiple"):
            whole.host_slice(0, hosts)
        return
    parts = [whole.host_slice(host, hosts).batch(step) for host in range(hosts)]
    assert len({tuple(array.shape for array in part) for part in parts}) == 1
    t, (rows, _) = parts[0].audio.shape[1], parts[0].targets.shape
    assert (t, rows) in {(shape.t, shape.b) for shape in whole.host_slice(0, hosts).shapes}
    equal(whole.batch(step), [np.concatenate(arrays) for arrays in zip(*parts, strict=True)])


@quick
@given(corpora, configs)
def test_evaluation_reads_each_utterance_once_in_length_order(corpus, config):
    source = BatchSource(corpus, TOKENIZER, config)
    order = []
    for batch in source.eval_batches():
        assert (batch.audio.shape[1], len(batch.index), batch.targets.shape[1]) in source.shapes
        for row, index in enumerate(batch.index):
            if index >= 0:
                order.append(int(index))
                np.testing.assert_array_equal(
                    batch.audio[row, : batch.audio_lengths[row]], corpus.audio(index)
                )
    lengths = [u.num_samples for u in corpus.utterances]
    assert order == sorted(range(len(corpus)), key=lambda i: (lengths[i], i))


def test_buckets_hold_equal_shares_of_the_audio():
    lengths = np.random.default_rng(1).integers(3000, 200_000, 500).tolist()
    source = BatchSource(Noises(lengths), TOKENIZER, BatchConfig(num_buckets=3))
    ends, total, running = [], sum(lengths), 0
    for length in sorted(lengths):
        before, running = running, running + length
        if any(before < total * k / 3 <= running for k in (1, 2, 3)):
            ends.append(-(-length // 1280) * 1280)
    assert [shape.t for shape in source.shapes] == ends
    assert [shape.b for shape in source.shapes] == [120 * 16000 // end for end in ends]
    for low, shape in zip([0, *ends[:-1]], source.shapes, strict=True):
        share = sum(length for length in lengths if low < length <= shape.t) / total
        assert share == pytest.approx(1 / 3, abs=0.02)


def test_padding_waste_counts_padding_and_filler():
    source = BatchSource(
        Noises([16000, 15000, 40000, 39000, 20000]),
        TOKENIZER,
        BatchConfig(batch_seconds=6, num_buckets=2, speed_factors=(0.9, 1.1)),
    )
    batches = epoch_of(source, 0)
    used = sum(int((b.audio_lengths * b.weights).sum()) for b in batches)
    held = sum(b.audio.size for b in batches)
    assert source.padding_waste == pytest.approx(1 - used / held, abs=1e-12)
    assert source.padding_waste == source.host_slice(0, 1).padding_waste


def test_epochs_are_shuffled_by_seed_and_epoch():
    def order(epoch, **settings):
        config = BatchConfig(batch_seconds=8, num_buckets=2, **settings)
        source = BatchSource(Noises([16000 + 100 * i for i in range(40)]), TOKENIZER, config)
        return [tuple(batch.index) for batch in epoch_of(source, epoch)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=1)
    assert {frozenset(rows) for rows in order(0)} != {frozenset(rows) for rows in order(1)}
    assert order(0, shuffle=False) == order(1, shuffle=False)
    flat = [i for rows in order(0, shuffle=False) for i in rows if i >= 0]
    assert flat == list(range(40))


def test_the_speed_of_an_utterance_depends_on_nothing_but_seed_epoch_and_row():
    corpus = Noises([10_000 + 777 * i for i in reversed(range(40))])

    def speeds(epoch, **settings):
        config = BatchConfig(speed_factors=(0.9, 1.0, 1.1), **settings)
        batches = epoch_of(BatchSource(corpus, TOKENIZER, config), epoch)
        pairs = np.concatenate([np.stack([b.index, b.audio_lengths], axis=1) for b in batches])
        return {index: length for index, length in pairs.tolist() if index >= 0}

    everything = speeds(1)
    some = speeds(1, max_seconds=1.5, batch_seconds=10, num_buckets=1, shuffle=False)
    assert 5 < len(some) < 40
    assert some == {i: everything[i] for i in some}
    assert speeds(0) != everything
    assert speeds(1, seed=1) != everything
    ratios = np.asarray([corpus.utterances[i].num_samples / n for i, n in everything.items()])
    counts = [int(np.sum(np.abs(ratios - factor) < 0.001)) for factor in (0.9, 1.0, 1.1)]
    assert sum(counts) == 40
    assert min(counts) >= 5


def test_what_cannot_be_used_is_skipped_and_named():
    texts = ["AB", "A1", "AAB", "AAB", "AB"]
    corpus = Noises([16000, 16000, 4400, 4398, 32001], texts)
    config = BatchConfig(max_seconds=2, speed_factors=(1.0, 1.1))
    # 4400 samples at speed 1.1 are 4000: 4 frames of 1000, just enough for A, blank, A, B
    source = BatchSource(corpus, TOKENIZER, config, frames_of=lambda samples: samples // 1000)
    assert source.indices.tolist() == [0, 2]
    assert {s.id: s.reason for s in source.skipped} == {
        "u1": "the tokenizer lacks ['1']",
        "u3": "CTC needs 4 frames for the text, the audio has 3 at speed 1.1",
        "u4": "2.0 s is above max_seconds = 2",
    }
    assert sorted(i for b in epoch_of(source, 0) for i in b.index if i >= 0) == [0, 2]


def test_steps_are_located_in_epochs_of_different_sizes():
    corpus = Noises(np.random.default_rng(0).integers(16_000, 60_000, 50).tolist())
    config = BatchConfig(batch_seconds=9, num_buckets=4, speed_factors=(0.8, 1.0, 1.25))
    source = BatchSource(corpus, TOKENIZER, config)
    sizes = [source.steps_in_epoch(epoch) for epoch in range(8)]
    assert len(set(sizes)) > 1
    places = [(epoch, position) for epoch, size in enumerate(sizes) for position in range(size)]
    assert [source.locate(step) for step in range(len(places))] == places
    assert BatchSource(corpus, TOKENIZER, config).locate(len(places) - 1) == places[-1]


def test_small_corpora_are_not_filled_up_to_batch_seconds():
    source = BatchSource(Noises([16000] * 5), TOKENIZER, BatchConfig(batch_multiple=2))
    assert [shape.b for shape in source.shapes] == [6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_seconds": 0}, "batch_seconds is 0"),
        ({"num_buckets": 0}, "num_buckets is 0"),
        ({"max_seconds": float("nan")}, "max_seconds is nan"),
        ({"batch_multiple": 0}, "batch_multiple is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"speed_factors": ()}, r"speed_factors are \(\)"),
        ({"speed_factors": (1.0, 0.0)}, "speed_factors"),
    ],
)
def test_config_errors(settings, message):
    with pytest.raises(InputError, match=message):
        BatchConfig(**settings)


def test_source_errors():
    with pytest.raises(InputError, match=r"is left of 2; the first, u0: 3.0 s is above"):
        BatchSource(Noises([48000, 48000]), TOKENIZER, BatchConfig(max_seconds=2))
    with pytest.raises(InputError, match=r"batch_multiple = 4 rows of 3.04 s; .* 12.16 or more"):
        BatchSource(Noises([48000]), TOKENIZER, BatchConfig(batch_seconds=10, batch_multiple=4))
    source = BatchSource(Noises([48000]), TOKENIZER, BatchConfig(batch_multiple=2))
    with pytest.raises(InputError, match="host 2 of 2"):
        source.host_slice(2, 2)
    with pytest.raises(InputError, match="step is -1"):
        source.batch(-1)


class Broken(Noises):
    def audio(self, index):
        if index == 3:
            raise InputError("u3: unreadable")
        return super().audio(index)


def worker_threads():
    return [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_an_error_in_a_thread_reaches_the_consumer_at_its_step():
    config = BatchConfig(batch_seconds=1.04, shuffle=False)
    source = BatchSource(Broken([16000 + i for i in range(6)]), TOKENIZER, config)
    iterator = source.iterator(0, 6, threads=2, prefetch=4)
    assert [step for step, _ in islice(iterator, 3)] == [0, 1, 2]
    with pytest.raises(InputError, match="u3: unreadable"):
        next(iterator)
    assert not worker_threads()


def test_closing_the_iterator_stops_its_threads():
    source = BatchSource(Noises([16000] * 4), TOKENIZER, BatchConfig(batch_seconds=1.04))
    iterator = source.iterator(0, 10**9, threads=2, prefetch=8)
    assert [step for step, _ in islice(iterator, 3)] == [0, 1, 2]
    assert worker_threads()
    iterator.close()
    assert not worker_threads()
    assert list(source.iterator(5, 0)) == []


def test_batches_are_built_ahead():
    built = []

    class Counted(Noises):
        def audio(self, index):
            built.append(index)
            return super().audio(index)

    source = BatchSource(Counted([16000] * 8), TOKENIZER, BatchConfig(batch_seconds=1.04))
    iterator = source.iterator(0, 8, prefetch=3)
    next(iterator)
    wait_for(lambda: len(built) == 4)
    iterator.close()


def test_as_many_batches_are_built_at_once_as_there_are_threads():
    together = threading.Barrier(3, timeout=PATIENCE)

    class Together(Noises):
        def audio(self, index):
            together.wait()
            return super().audio(index)

    source = BatchSource(Together([16000] * 3), TOKENIZER, BatchConfig(batch_seconds=1.04))
    assert [step for step, _ in source.iterator(0, 3, threads=3)] == [0, 1, 2]


def test_speeds_are_drawn_once_an_epoch(monkeypatch):
    """Drawn for every batch anew, those of LibriSpeech's 281,241 utterances took longer than a small batch."""
    config = BatchConfig(batch_seconds=1.3, speed_factors=(0.9, 1.0, 1.1))
    source = BatchSource(Noises([16000] * 6), TOKENIZER, config)
    steps = source.steps_in_epoch(0)
    source.batch(0)
    monkeypatch.setattr(source, "_choices", None)
    for step in range(1, steps):
        source.batch(step)
