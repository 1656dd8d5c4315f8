"""The streamer against the whole recording, and against bad input."""

import jax
import numpy as np
import pytest
import soxr
from flax import nnx

from edgespeech.data.tokenizer import SentencePieceTokenizer, ctc_collapse
from edgespeech.errors import InputError
from edgespeech.inference.stream_words import MAX_WORD_TOKENS, GreedyWords, ends_word
from edgespeech.inference.streaming import Streamer
from edgespeech.inference.words import Word, text_of, token_texts, words_of_path
from edgespeech.models.edge_conformer import EdgeConformer
from tests.support.edge import TOKENIZER, TOY
from tests.support.modules import randomize

CONFIG = TOY
CHUNK = 3 * 640
LENGTHS = (CHUNK * 12 + 700, CHUNK * 9, CHUNK * 7 + 1300)
ENDPOINT = 0.3


def noise(t, seed):
    """Noise whose level changes every 60 ms, in [-0.9, 0.9]."""
    rng = np.random.default_rng(seed)
    level = np.repeat(10.0 ** rng.uniform(-3, -0.5, size=t // 960 + 1), 960)[:t]
    return np.clip(level * rng.normal(size=t), -0.9, 0.9).astype(np.float32)


AUDIO = [noise(t, seed) for seed, t in enumerate(LENGTHS)]


run = nnx.jit(lambda model, x, lengths: model(x, lengths))


def run_whole(model):
    padded = np.stack([np.pad(x, (0, max(LENGTHS) - len(x))) for x in AUDIO])
    return map(np.asarray, run(model, padded, np.array(LENGTHS)))


@pytest.fixture(scope="module")
def model():
    """Random, with logits of mean 0 over time: every token is the most likely one now and then."""
    model = randomize(EdgeConformer(CONFIG, rngs=nnx.Rngs(0)), seed=1)
    logits, _ = run_whole(model)
    model.head.bias[...] -= logits[0].mean(0)
    return model


@pytest.fixture(scope="module")
def paths(model):
    """The greedy path of every whole recording."""
    logits, frames = run_whole(model)
    return [np.argmax(row[:n], -1) for row, n in zip(logits, frames, strict=True)]


@pytest.fixture(scope="module")
def streamer(model):
    """One for all tests, which begin with new streams: its program is compiled once."""
    return Streamer(model, TOKENIZER, num_streams=3, endpoint_seconds=ENDPOINT)


@pytest.fixture(autouse=True)
def _new_streams(streamer):
    for stream in range(3):
        streamer.reset(stream)


def words_by_loops(path):
    """Texts with times: a word ends at a space, or once 0.3 s pass without a letter."""
    letters = {2: "A", 3: "B", 4: "C"}
    words, open_word, last = [], None, None
    for frame, token in enumerate(path):
        is_new = frame == 0 or path[frame - 1] != token
        if open_word and ((token == 1 and is_new) or (frame - last) * 0.04 > 0.3):
            words.append(open_word)
            open_word = None
        if token in letters:
            if is_new:
                if open_word is None:
                    open_word = ["", frame * 0.04, None]
                open_word[0] += letters[token]
            if open_word is not None:
                open_word[2] = (frame + 1) * 0.04
            last = frame
    if open_word:
        words.append(open_word)
    return words


def assert_words(got, path):
    want = words_by_loops(path)
    assert [word.text for word in got] == [text for text, _, _ in want]
    assert {word.stability for word in got} <= {1.0}
    np.testing.assert_allclose(
        [(word.start, word.end) for word in got], [times for _, *times in want], atol=1e-9
    )


def stream_all(streamer, rng, spoil=None):
    """Feeds every recording in random blocks, each stream at its own pace; returns all final words."""
    left, words = list(AUDIO), [[], [], []]
    while any(len(x) for x in left):
        blocks = {}
        for stream in rng.permutation(3)[: rng.integers(1, 4)]:
            size = int(rng.choice([0, 1, 37, 640, 1919, 1920, 5000]))
            blocks[int(stream)], left[stream] = left[stream][:size], left[stream][size:]
        if spoil is not None:
            spoil(streamer)
        for stream, update in streamer.feed(blocks).items():
            words[stream] += update.final
    for stream in range(3):
        words[stream] += streamer.close(stream).final
    return words


@pytest.mark.parametrize("seed", [0, 1])
def test_any_blocks_give_the_text_of_the_whole(streamer, paths, seed):
    assert sum(len(words_by_loops(path)) for path in paths) >= 10, "too few words to show anything"
    words = stream_all(streamer, np.random.default_rng(seed))
    for got, path in zip(words, paths, strict=True):
        assert_words(got, path)
    assert streamer._step._cache_size() == 1


def test_bad_blocks_leave_every_stream_as_it_is(streamer, paths):
    nan = AUDIO[0][:500].copy()
    nan[7] = np.nan
    bad = (
        (nan, 16_000, "1 NaN or infinite samples of 500"),
        (100 * AUDIO[0][:5000], 16_000, "the limit is 1: scale"),
        (np.zeros((2, 5), np.float32), 16_000, r"float32 of shape \[2, 5\]"),
        (np.zeros(5, np.int16), 16_000, "int16 of shape"),
        ([0.0], 16_000, "the block is list"),
        (AUDIO[0][:50], 100, "sample_rate is 100 Hz"),
    )

    def spoil(streamer):
        for block, rate, message in bad:
            with pytest.raises(InputError, match=message):
                streamer.feed({0: AUDIO[0][:3000], 2: block}, rate)
        with pytest.raises(InputError, match="stream 3 does not exist: there are 0 to 2"):
            streamer.feed({0: AUDIO[0][:3000], 3: AUDIO[0]})

    words = stream_all(streamer, np.random.default_rng(2), spoil)
    for got, path in zip(words, paths, strict=True):
        assert_words(got, path)


def test_closing_and_starting_again(streamer, paths):
    first = streamer.feed({0: AUDIO[0], 1: AUDIO[1][:5000]})
    closed = streamer.close(0)
    assert closed.partial is None
    assert_words([*first[0].final, *closed.final], paths[0])
    for act in (lambda: streamer.feed({0: AUDIO[0]}), lambda: streamer.close(0)):
        with pytest.raises(InputError, match=r"stream 0 is closed: reset\(0\)"):
            act()
    streamer.reset(0)
    again = streamer.feed({0: AUDIO[2]})[0].final + streamer.close(0).final
    assert_words(again, paths[2])
    rest = streamer.feed({1: AUDIO[1][5000:]})[1].final + streamer.close(1).final
    assert_words([*first[1].final, *rest], paths[1])
    assert streamer.close(2).final == ()


def test_another_sample_rate(streamer, model):
    slow = noise(8000 * 2, 5)
    whole = np.clip(soxr.resample(slow, 8000, 16_000), -1, 1)
    logits, frames = run(model, whole[None], np.array([len(whole)]))
    updates = [streamer.feed({1: block}, 8000)[1] for block in np.split(slow, [1, 700, 9000])]
    got = [word for update in (*updates, streamer.close(1)) for word in update.final]
    assert_words(got, np.argmax(np.asarray(logits)[0, : frames[0]], -1))
    streamer.feed({2: slow}, 8000)
    with pytest.raises(InputError, match="sample_rate is 16000 Hz, and was 8000 before"):
        streamer.feed({2: slow}, 16_000)


def test_clipping_is_defined(streamer):
    loud = np.clip(3 * AUDIO[0], -1.9, 1.9)
    streamer.feed({0: loud, 1: np.clip(loud, -1, 1)})
    for leaf in jax.tree.leaves(streamer._state):
        np.testing.assert_array_equal(leaf[0], leaf[1])


def test_hours_need_no_more_memory_than_seconds(streamer):
    def held():
        arrays = [*jax.tree.leaves(streamer._state), *(s.pending for s in streamer._streams)]
        tokens = max(len(s.words._open) for s in streamer._streams)
        return sum(a.nbytes for a in arrays), tokens

    limit = held()[0] + 3 * 4 * CHUNK
    for second in range(40):
        streamer.feed({s: noise(16_000, second) for s in range(3)})
        assert held()[0] <= limit
        assert held()[1] <= MAX_WORD_TOKENS
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(streamer._state))


def test_settings(model):
    with pytest.raises(InputError, match="num_streams is 0"):
        Streamer(model, TOKENIZER, num_streams=0)
    with pytest.raises(InputError, match="endpoint_seconds 0"):
        Streamer(model, TOKENIZER, endpoint_seconds=0)


# ------------------------------------------------------------------------------------- words


def greedy_words(endpoint_seconds=10.0):
    return GreedyWords(token_texts(TOKENIZER), 0.04, endpoint_seconds)


def test_partial_and_final_words():
    words = greedy_words()
    # A A blank A | blank B: frames 0 to 6
    assert words.push(np.array([2, 2, 0]), np.array([0.1, 0.2, 0.7])) == []
    assert words.partial() == Word("A", 0.0, 0.08, 0.7)
    assert words.push(np.array([2]), np.array([0.3])) == []
    assert words.partial() == Word("AA", 0.0, 0.16, 0.3)
    assert words.push(np.array([1, 0, 3]), np.array([0.9, 0.9, 0.2])) == [
        Word("AA", 0.0, 0.16, 1.0)
    ]
    assert words.partial() == Word("B", 6 * 0.04, 7 * 0.04, 0.2)
    assert words.end() == [Word("B", 6 * 0.04, 7 * 0.04, 1.0)]
    assert words.partial() is None
    assert words.end() == []


def test_endpoints():
    """Two words, 12 frames of silence, a word: a pause of 0.4 s is found in its tenth frame, once."""
    path = np.array([0] * 20 + [2, 1, 3] + [0] * 6 + [1] + [0] * 5 + [4])
    words, found = greedy_words(0.4), []
    for frame, token in enumerate(path):
        final = words.push(np.array([token]), np.array([0.5]))
        found += [(frame, words.ended, word.text) for word in final]
        if words.ended and not final:
            found.append((frame, True, None))
    assert found == [(21, False, "A"), (29, False, "B"), (32, True, None)]
    words = greedy_words(0.4)
    silence = np.zeros(15, int)
    final = words.push(np.array([2, 3, *silence]), np.full(17, 0.5))
    assert [(word.text, words.ended) for word in final] == [("AB", True)]
    assert words.push(silence, np.full(15, 0.5)) == []
    assert not words.ended


def test_a_word_without_end_is_cut():
    words = greedy_words()
    path = np.tile([2, 3], MAX_WORD_TOKENS)
    final = words.push(path, np.zeros(len(path)))
    assert [word.text for word in final] == ["AB" * (MAX_WORD_TOKENS // 2)]
    assert words.partial().text == "AB" * (MAX_WORD_TOKENS // 2)


def test_limits_of_words_in_sentence_pieces():
    tokenizer = SentencePieceTokenizer.train(["BEES SEE BAD BEADS", "A BAD SEED"], 14)
    texts = token_texts(tokenizer)
    pieces = [tokenizer._processor.id_to_piece(i) for i in range(14)]
    want = [i == 0 or piece.startswith("\u2581") for i, piece in enumerate(pieces)]
    np.testing.assert_array_equal(ends_word(texts), want)
    words = GreedyWords(texts, 0.04, 10.0)
    path = np.array(tokenizer.encode("BAD BEADS SEE"))
    blanks = np.zeros_like(path)
    path = np.stack([path, blanks], 1).reshape(-1)
    final = words.push(path, np.zeros(len(path))) + words.end()
    assert [word.text for word in final] == ["BAD", "BEADS", "SEE"]


def test_without_a_pause_the_words_are_those_of_a_recording():
    texts = token_texts(TOKENIZER)
    path = np.random.default_rng(0).choice(5, size=300, p=[0.3, 0.2, 0.2, 0.2, 0.1])
    words = GreedyWords(texts, 0.04, 1e9)
    got = words.push(path, np.zeros(len(path))) + words.end()
    assert len(got) > 30
    assert got == words_of_path(path, texts, 0.04)
    assert text_of(got) == TOKENIZER.decode(ctc_collapse(path))
