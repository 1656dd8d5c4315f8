"""Searches against the model without a cache: an argmax loop, and every text there is."""

import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.inference.seq2seq import beam_search, greedy_search, token_limits
from edgespeech.inference.transcribe import Transcriber
from tests.support.modules import randomize
from tests.support.moonshine import call, speech, tiny_moonshine

BOS, EOS = 1, 2
SIZE = 7
SAMPLES = (4000, 2600, 1500, 3100)
LIMITS = np.array([7, 5, 7, 1], np.int32)
AUDIO, LENGTHS = speech(SAMPLES, seed=3)


@functools.cache
def split(vocab_size):
    """A model of few tokens; its texts end by themselves and at their limits, which the tests check."""
    seed, scale = {11: (36, 0.6), 5: (44, 0.35)}[vocab_size]
    return nnx.split(randomize(tiny_moonshine(scale=0.0, vocab_size=vocab_size), seed, scale))


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def search(graphdef, state, audio, lengths, limits, size, width, length_penalty):
    model = nnx.merge(graphdef, state)
    memory, memory_lengths, _ = model.encode(audio, lengths)
    if width is None:
        return greedy_search(model, memory, memory_lengths, limits, size)
    return beam_search(
        model, memory, memory_lengths, limits, size, width=width, length_penalty=length_penalty
    )


def run(vocab_size, rows=slice(None), limits=LIMITS, size=SIZE, width=None, length_penalty=0.0):
    decoded = search(
        *split(vocab_size), AUDIO[rows], LENGTHS[rows], limits[rows], size, width, length_penalty
    )
    return jax.tree.map(np.asarray, decoded)


def log_probs(vocab_size, audio, lengths, tokens):
    """`[b u v]`, of the full model in float64, for the tokens after the first."""
    logits = np.float64(
        call(
            *split(vocab_size), audio, lengths, tokens, np.full(len(tokens), tokens.shape[1])
        ).logits
    )
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_greedy_equals_the_argmax_loop_without_a_cache():
    found = run(11)
    tokens = np.full((len(AUDIO), SIZE + 1), BOS)
    for position in range(SIZE):
        step = log_probs(11, AUDIO, LENGTHS, tokens[:, :SIZE])
        tokens[:, position + 1] = step[:, position].argmax(-1)
    step = log_probs(11, AUDIO, LENGTHS, tokens[:, :SIZE])
    ended = []
    for row, limit in enumerate(LIMITS):
        text = tokens[row, 1 : limit + 1].tolist()
        ended.append(EOS in text)
        text = text[: text.index(EOS)] if EOS in text else text
        assert found.lengths[row] == len(text)
        assert found.tokens[row].tolist() == text + [EOS] * (SIZE - len(text))
        scored = text + [EOS] * ended[-1]
        wanted = sum(step[row, i, token] for i, token in enumerate(scored))
        np.testing.assert_allclose(found.scores[row], wanted, atol=1e-4)
    assert 0 < sum(ended) < len(ended), "both ways to stop must occur"
    assert len({tuple(row) for row in found.tokens}) > 2


@pytest.mark.parametrize("width", [None, 4])
def test_alone_equals_in_the_batch(width):
    together = run(11, width=width)
    audio, row = AUDIO[1:2, : SAMPLES[1]], slice(1, 2)
    alone = search(*split(11), audio, LENGTHS[row], LIMITS[row], SIZE, width, 0.0)
    np.testing.assert_array_equal(alone.tokens, together.tokens[row])
    np.testing.assert_array_equal(alone.lengths, together.lengths[row])
    np.testing.assert_allclose(alone.scores, together.scores[row], atol=1e-4)


def test_beam_of_width_1_is_greedy():
    greedy, beam = run(11), run(11, width=1)
    np.testing.assert_array_equal(beam.tokens, greedy.tokens)
    np.testing.assert_array_equal(beam.lengths, greedy.lengths)
    np.testing.assert_allclose(beam.scores, greedy.scores, atol=1e-5)


def every_text(vocab_size, limit):
    """Every text that ends within the limit, with its end token, and every one of the full length."""
    others = [t for t in range(vocab_size) if t != EOS]
    return [
        [*text, *end]
        for length in range(limit + 1)
        for text in itertools.product(others, repeat=length)
        for end in ([[EOS]] if length < limit else [[]])
    ]


@functools.cache
def scores_of_every_text(row):
    """By text: log p of the 85 texts of five tokens within the limit 3."""
    texts = every_text(5, 3)
    tokens = np.full((len(texts), 4), BOS)
    for i, text in enumerate(texts):
        tokens[i, 1 : len(text) + 1] = text
    audio = np.repeat(AUDIO[row : row + 1], len(texts), axis=0)
    steps = log_probs(5, audio, np.full(len(texts), SAMPLES[row]), tokens[:, :-1])
    every = [
        [*itertools.accumulate(steps[i, j, t] for j, t in enumerate(text))]
        for i, text in enumerate(texts)
    ]
    assert abs(sum(np.exp(sums[-1]) for sums in every) - 1) < 1e-5, (
        "the texts must be all there are"
    )
    # a text cut off at a lower limit is the beginning of a longer one
    return {
        tuple(text[: j + 1]): sums[j]
        for text, sums in zip(texts, every, strict=True)
        for j in range(len(text))
    }


@pytest.mark.parametrize("length_penalty", [0.0, 1.5])
def test_a_wide_beam_finds_the_best_text_there_is(length_penalty):
    limits = np.array([3, 2, 3, 1], np.int32)
    # at most 16 open texts: the beam never has to drop one
    found = run(5, limits=limits, size=3, width=16, length_penalty=length_penalty)
    assert len(set(found.lengths.tolist())) == 3
    for row, limit in enumerate(limits):
        scores = scores_of_every_text(row)
        best = max(every_text(5, limit), key=lambda t: scores[tuple(t)] / len(t) ** length_penalty)
        body = [t for t in best if t != EOS]
        assert found.tokens[row].tolist() == body + [EOS] * (3 - len(body))
        assert found.lengths[row] == len(body)
        np.testing.assert_allclose(found.scores[row], scores[tuple(best)], atol=1e-4)


def test_a_wider_beam_is_never_worse_here_and_better_once():
    greedy, beam = run(11), run(11, width=4)
    assert (beam.scores >= greedy.scores - 1e-5).all()
    assert (beam.scores > greedy.scores + 0.01).any()


def test_a_limit_of_zero_is_an_empty_text():
    for width in (None, 4):
        found = run(11, limits=np.array([3, 0, 2, 0], np.int32), width=width)
        assert found.lengths[1] == found.lengths[3] == 0
        assert (found.tokens[1] == EOS).all()
        assert found.lengths[0] > 0


def test_token_limits():
    assert token_limits(np.array([16_000, 16_001, 160_000, 0])).tolist() == [7, 7, 65, 0]
    assert token_limits(np.array([16_000, 24_000]), 2.0).tolist() == [2, 3]
    with pytest.raises(InputError, match="tokens_per_second is 0"):
        token_limits(np.array([1]), 0.0)


@pytest.mark.parametrize(("width", "penalty"), [(0, 0.0), (2, -1.0)])
def test_beam_arguments(width, penalty):
    with pytest.raises(InputError, match=f"beam width is {width} and length_penalty {penalty}"):
        run(11, width=width, length_penalty=penalty)


class Ids:
    """Text of tokens: their numbers."""

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.mark.parametrize(("width", "batch_size"), [(1, 2), (4, 4)])
def test_transcriber(width, batch_size):
    transcribe = Transcriber(
        nnx.merge(*split(11)),
        Ids(),
        beam_width=width,
        tokens_per_second=28,  # at most 7
        batch_size=batch_size,
        bucket_seconds=0.1,
    )
    recordings = [AUDIO[row, :n] for row, n in enumerate(SAMPLES)]
    found = transcribe([recordings[0], recordings[0][:800], *recordings[1:]])
    limits = token_limits(LENGTHS, 28)
    wanted = run(11, limits=limits, width=None if width == 1 else width)
    texts = [
        " ".join(map(str, row[:n])) for row, n in zip(wanted.tokens, wanted.lengths, strict=True)
    ]
    assert found == [texts[0], "", *texts[1:]]
    assert len(set(found)) > 3
    assert transcribe([]) == []


def test_transcriber_names_what_is_wrong():
    model = nnx.merge(*split(11))
    with pytest.raises(InputError, match="batch_size is 0"):
        Transcriber(model, Ids(), batch_size=0)
    transcribe = Transcriber(model, Ids())
    for bad in (np.zeros((2, 3), np.float32), np.zeros(3, np.int16), np.array([0.0, np.nan])):
        with pytest.raises(InputError, match="recording 1 is"):
            transcribe([np.zeros(9, np.float32), bad])
