"""Greedy and beam search with an encoder-decoder: static shapes, one `lax.while_loop`, a key/value cache.

Both are pure functions to be called inside jit. A row's result depends on that row alone: it stops at its own end token
or its own limit, and the loop runs until every row has stopped.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from edgespeech.errors import InputError
from edgespeech.types import SAMPLE_RATE, Array, Float, Frames, Int, Lengths

# Moonshine's rule for English (model card of UsefulSensors/moonshine-base): more than this is a decoder that repeats.
TOKENS_PER_SECOND = 6.5


class StepModel(Protocol):
    """What the searches need of a model; `edgespeech.models.moonshine.Moonshine` is one."""

    config: Any  # with bos_id and eos_id

    def init_cache(self, memory: Frames, memory_lengths: Lengths, size: int) -> Any:
        """A tree of arrays `[b ...]`."""
        ...

    def step(
        self,
        tokens: Int[Array, "b"],
        position: Int[Array, ""],
        cache: Any,
        memory_lengths: Lengths,
    ) -> tuple[Float[Array, "b v"], Any]:
        """Logits after the token at the position, and the cache with it."""
        ...

    def reorder_cache(self, cache: Any, rows: Int[Array, "b"]) -> Any:
        """The cache whose row i continues row `rows[i]`, of the same utterance."""
        ...


class Decoded(NamedTuple):
    """Texts as tokens.

    Attributes:
        tokens: `[b u]` int32; the end token from the end of the text on.
        lengths: `[b]` int32, tokens before the end token.
        scores: `[b]` float32, the sum of log p of the tokens and, where one was found, of the end token.
    """

    tokens: Int[Array, "b u"]
    lengths: Int[Array, "b"]
    scores: Float[Array, "b"]


def token_limits(
    num_samples: np.ndarray, tokens_per_second: float = TOKENS_PER_SECOND
) -> np.ndarray:
    """The most tokens for each recording, `ceil(seconds * tokens_per_second)`, end token counted; int32 `[b]`.

    Args:
        num_samples: int `[b]`, at 16 kHz.
        tokens_per_second: the rule's factor. Moonshine's C++ library 0.1.4 takes 13.

    Raises:
        InputError: tokens_per_second is not above 0.
    """
    if not tokens_per_second > 0:
        raise InputError(f"tokens_per_second is {tokens_per_second}: it must be above 0")
    return np.ceil(np.asarray(num_samples) / SAMPLE_RATE * tokens_per_second).astype(np.int32)


def greedy_search(
    model: StepModel, memory: Frames, memory_lengths: Lengths, limits: Int[Array, "b"], size: int
) -> Decoded:
    """The most probable token at every position, `y_i = argmax p(y_i | y_<i, audio)`.

    Args:
        model: in inference.
        memory: `[b n d]`, the encoder's output.
        memory_lengths: its valid frames.
        limits: the most tokens of each row; a row of limit 0 is empty.
        size: static, at least the largest limit: the length u of the result.
    """
    b = memory.shape[0]
    bos, eos = model.config.bos_id, model.config.eos_id

    class State(NamedTuple):
        position: Array
        last: Array
        done: Array
        decoded: Decoded
        cache: Any

    def advance(s: State) -> State:
        logits, cache = model.step(s.last, s.position, s.cache, memory_lengths)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        token = jnp.where(s.done, eos, jnp.argmax(log_probs, axis=-1))
        gain = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
        decoded = Decoded(
            tokens=s.decoded.tokens.at[:, s.position].set(token),
            lengths=s.decoded.lengths + (~s.done & (token != eos)),
            scores=s.decoded.scores + jnp.where(s.done, 0.0, gain),
        )
        done = s.done | (token == eos) | (s.position + 1 >= limits)
        return State(s.position + 1, token, done, decoded, cache)

    start = State(
        position=jnp.array(0, jnp.int32),
        last=jnp.full(b, bos, jnp.int32),
        done=limits <= 0,
        decoded=Decoded(
            tokens=jnp.full((b, size), eos, jnp.int32),
            lengths=jnp.zeros(b, jnp.int32),
            scores=jnp.zeros(b, jnp.float32),
        ),
        cache=model.init_cache(memory, memory_lengths, size),
    )
    return jax.lax.while_loop(
        lambda s: (s.position < size) & ~jnp.all(s.done), advance, start
    ).decoded


def beam_search(
    model: StepModel,
    memory: Frames,
    memory_lengths: Lengths,
    limits: Int[Array, "b"],
    size: int,
    *,
    width: int,
    length_penalty: float = 0.0,
) -> Decoded:
    """The best text among those that a beam of `width` open texts meets.

        score(y) = log p(y | audio) / len(y)^length_penalty,   len with the end token

    At each position the open texts are continued by every token. Of the 2 width best continuations, those that end
    are compared with the best finished text, if among the first `width`; the best `width` others stay open (as in
    transformers). At a row's limit the open texts count as finished. A row stops once no open text can still win,
    which is exact: log p only falls, and no text is longer than the limit.

    Args:
        model: in inference.
        memory: `[b n d]`, the encoder's output.
        memory_lengths: its valid frames.
        limits: the most tokens of each row.
        size: static, at least the largest limit.
        width: open texts a row, static. With 1 and no length penalty this is greedy search.
        length_penalty: 0 compares log p itself; above 0, longer texts gain.

    Returns:
        the best text of each row; `scores` are log p, without the penalty.

    Raises:
        InputError: width is below 1 or length_penalty below 0.
    """
    if width < 1 or length_penalty < 0:
        raise InputError(
            f"beam width is {width} and length_penalty {length_penalty}: they must be at least 1 and at least 0"
        )
    b, k = memory.shape[0], width
    bos, eos = model.config.bos_id, model.config.eos_id
    none = -jnp.inf

    class State(NamedTuple):
        position: Array
        open_tokens: Array  # [b k u]
        open_scores: Array  # [b k], log p
        done: Array
        best: Decoded
        best_rank: Array  # [b], the best finished text's score with the penalty
        cache: Any  # rows b k

    def advance(s: State) -> State:
        previous = s.open_tokens[:, :, jnp.maximum(s.position - 1, 0)]
        last = jnp.where(s.position == 0, bos, previous).reshape(b * k)
        logits, cache = model.step(last, s.position, s.cache, jnp.repeat(memory_lengths, k))
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1).reshape(b, k, -1)
        v = log_probs.shape[-1]
        all_scores = (s.open_scores[..., None] + log_probs).reshape(b, k * v)
        scores, index = jax.lax.top_k(all_scores, min(2 * k, k * v))
        parents, tokens = index // v, index % v
        texts = jnp.take_along_axis(s.open_tokens, parents[..., None], axis=1)
        texts = texts.at[:, :, s.position].set(tokens)

        # Finished: at its end token, or at the row's limit.
        at_limit = (s.position + 1 >= limits)[:, None]
        ends = ((tokens == eos) | at_limit) & (jnp.arange(scores.shape[1]) < k)
        rank = jnp.where(ends, scores / (s.position + 1.0) ** length_penalty, none)
        winner = jnp.argmax(rank, axis=1)[:, None]
        win_rank = jnp.take_along_axis(rank, winner, axis=1)[:, 0]
        win_token = jnp.take_along_axis(tokens, winner, axis=1)[:, 0]
        found = Decoded(
            tokens=jnp.take_along_axis(texts, winner[..., None], axis=1)[:, 0],
            lengths=s.position + (win_token != eos).astype(jnp.int32),
            scores=jnp.take_along_axis(scores, winner, axis=1)[:, 0],
        )
        better = ~s.done & (win_rank > s.best_rank)
        best = jax.tree.map(
            lambda new, old: jnp.where(better.reshape(-1, *(1,) * (old.ndim - 1)), new, old),
            found,
            s.best,
        )
        best_rank = jnp.where(better, win_rank, s.best_rank)

        # Open: the best that do not end.
        scores, kept = jax.lax.top_k(jnp.where(tokens == eos, none, scores), k)
        parents = jnp.take_along_axis(parents, kept, axis=1)
        texts = jnp.take_along_axis(texts, kept[..., None], axis=1)
        rows = (jnp.arange(b)[:, None] * k + parents).reshape(b * k)
        reachable = scores[:, 0] / jnp.maximum(limits, 1) ** length_penalty
        done = s.done | at_limit[:, 0] | (best_rank >= reachable)
        cache = model.reorder_cache(cache, rows)
        return State(s.position + 1, texts, scores, done, best, best_rank, cache)

    cache = model.init_cache(memory, memory_lengths, size)
    start = State(
        position=jnp.array(0, jnp.int32),
        open_tokens=jnp.full((b, k, size), eos, jnp.int32),
        # All open texts are the same at first: one of them counts.
        open_scores=jnp.where(jnp.arange(k) == 0, jnp.zeros((b, k)), none),
        done=limits <= 0,
        best=Decoded(
            tokens=jnp.full((b, size), eos, jnp.int32),
            lengths=jnp.zeros(b, jnp.int32),
            scores=jnp.zeros(b, jnp.float32),
        ),
        best_rank=jnp.full(b, none),
        cache=jax.tree.map(lambda a: jnp.repeat(a, k, axis=0), cache),
    )
    return jax.lax.while_loop(lambda s: (s.position < size) & ~jnp.all(s.done), advance, start).best
