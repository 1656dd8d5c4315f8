"""Labels of the training audio: what the teacher hears, worked out once, and transcripts."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from edgespeech.conversion.labels import (
    TokenIds,
    label_with_teacher,
    label_with_transcripts,
    teacher_texts,
)
from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.errors import InputError
from edgespeech.evaluation.decode import Seq2SeqDecoder, TokenText
from edgespeech.inference.transcribe import Transcriber
from tests.support.moonshine_conversion import NoiseCorpus, letters, talkative_moonshine

CONFIG = BatchConfig(batch_seconds=1.3, num_buckets=1, speed_factors=(0.5, 2.0))
TOKENS_PER_SECOND = 20


class Counting(Seq2SeqDecoder):
    """Counts the batches that it is asked for."""

    calls = 0

    def token_texts(self, state, batch):
        Counting.calls += 1
        return super().token_texts(state, batch)


@pytest.fixture(scope="module")
def teacher():
    graphdef, state = nnx.split(talkative_moonshine())
    return Counting(graphdef, letters(), TOKENS_PER_SECOND), state


@pytest.fixture(scope="module")
def corpus():
    return NoiseCorpus(8, seed=4)


@pytest.fixture
def labelled(teacher, corpus, tmp_path):
    path = tmp_path / "deep" / "labels.jsonl"
    return path, teacher_texts(path, *teacher, corpus, CONFIG)


def test_texts_are_those_of_the_transcriber(labelled, corpus):
    _, texts = labelled
    transcribe = Transcriber(
        talkative_moonshine(),
        letters(),
        tokens_per_second=TOKENS_PER_SECOND,
        batch_size=4,
        bucket_seconds=0.1,
    )
    heard = transcribe([corpus.audio(i) for i in range(len(corpus))])
    assert [letters().decode(texts[u.id].tokens) for u in corpus.utterances] == heard
    assert len(set(heard)) > 2
    assert {text.ended for text in texts.values()} == {True, False}
    for u in corpus.utterances:
        limit = np.ceil(u.num_samples / 16_000 * TOKENS_PER_SECOND)
        assert texts[u.id].ended == (len(texts[u.id].tokens) < limit)


def test_what_is_known_is_not_worked_out_again(teacher, corpus, labelled):
    path, texts = labelled
    whole, before = path.read_bytes(), Counting.calls
    assert teacher_texts(path, *teacher, corpus, CONFIG) == texts
    assert Counting.calls == before
    # A run that was killed while it wrote the sixth line.
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:9])
    assert teacher_texts(path, *teacher, corpus, CONFIG) == texts
    assert Counting.calls == before + 1
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_damaged_file(teacher, corpus, labelled):
    path, _ = labelled
    path.write_text('{"id": 3}\n')
    with pytest.raises(InputError, match=r"labels.jsonl is damaged .*: remove it"):
        teacher_texts(path, *teacher, corpus, CONFIG)


def test_targets_of_batches_are_the_teachers_tokens(corpus, labelled):
    _, texts = labelled
    train = label_with_teacher(corpus, texts)
    ended = [u.id for u in corpus.utterances if texts[u.id].ended]
    assert [u.id for u in train.utterances] == ended
    assert {s.id: s.reason for s in train.skipped} == {
        u.id: "the teacher's text does not end" for u in corpus.utterances if u.id not in ended
    }
    rows = {u.id: i for i, u in enumerate(corpus.utterances)}
    seen = []
    for batch in BatchSource(train, TokenIds(), CONFIG).eval_batches():
        for row in np.flatnonzero(batch.weights):
            u = train.utterances[batch.index[row]]
            target = batch.targets[row, : batch.target_lengths[row]].tolist()
            assert target == texts[u.id].tokens
            audio = batch.audio[row, : batch.audio_lengths[row]]
            np.testing.assert_array_equal(audio, corpus.audio(rows[u.id]))
            seen.append(u.id)
    assert sorted(seen) == sorted(ended)


def test_too_long_ones_get_no_label(teacher, corpus, tmp_path):
    seconds = sorted(u.num_samples / 16_000 for u in corpus.utterances)
    config = BatchConfig(batch_seconds=1.3, num_buckets=1, max_seconds=seconds[6])
    texts = teacher_texts(tmp_path / "labels.jsonl", *teacher, corpus, config)
    assert len(texts) == 7
    reasons = [s.reason for s in label_with_teacher(corpus, texts).skipped]
    assert sum("s is above max_seconds" in reason for reason in reasons) == 1


def test_nothing_is_left(corpus):
    texts = {u.id: TokenText([3], False) for u in corpus.utterances}
    with pytest.raises(InputError, match=r"no utterance of 'train' has a label; .* does not end"):
        label_with_teacher(corpus, texts)


def test_transcripts_in_lower_case():
    class Codes:
        def can_encode(self, text):
            return set()

        def encode(self, text):
            return np.asarray([ord(c) for c in text], np.int32)

    train = label_with_transcripts(NoiseCorpus(2), Codes())
    assert TokenIds().encode(train.utterances[1].text).tolist() == [ord(c) for c in "no text"]
    assert TokenIds().can_encode("12 a3") == {"a"}


def test_rows_are_plain_json(labelled):
    path, texts = labelled
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["id"]: TokenText(row["tokens"], row["ended"]) for row in rows} == texts
    assert all(isinstance(leaf, int | bool) for leaf in jax.tree.leaves(list(texts.values())))
