"""n-gram language models estimated from text: interpolated modified Kneser-Ney smoothing.

    p(w | h) = (a(h w) - D(a(h w))) / a(h .) + b(h) p(w | h'),    h' is h without its oldest word
    b(h)     = sum_k D(k) |{x: a(h x) = k}| / a(h .),             a(h .) = sum_x a(h x)

a(h w) is the count of h w for the highest order and behind the start of a text; else the number of different words that
come before it. The discounts of each order come from t_k, its number of n-grams with a = k; D(3) is also for more:

    D(k) = k - (k + 1) t_1 t_{k+1} / ((t_1 + 2 t_2) t_k)

The recursion ends at the uniform distribution over the words, `</s>` and `<unk>`. Chen and Goodman, "An empirical study
of smoothing techniques for language modeling", 1999; counts and end of the recursion as in Heafield et al., "Scalable
modified Kneser-Ney language model estimation", 2013.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from edgespeech.errors import InputError
from edgespeech.inference.language_model import (
    END,
    START,
    UNKNOWN,
    Context,
    Entry,
    NgramModel,
)

# Where a text is too small or too even for the formula.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
START_LOG10 = -99.0


def estimate_ngrams(texts: Iterable[str], order: int) -> NgramModel:
    """The model of texts, one sentence or utterance each, of words between spaces.

    Args:
        texts: empty ones do not count.
        order: words of the longest n-gram, at least 1.

    Raises:
        InputError: the order is below 1, no text has a word, or a text has one of the words `<s>`, `</s>`, `<unk>`.
    """
    if order < 1:
        raise InputError(f"a language model of order {order}: it must be at least 1")
    counts = _adjusted(_counts(texts, order))
    uniform = 1.0 / (len(counts[0]) + 1)  # <unk> is the one word without a count
    probability: dict[Context, float] = {}
    backoff: dict[Context, float] = {}
    for n, of_order in enumerate(counts, 1):
        discounts = _discounts(of_order)
        totals: Counter[Context] = Counter()
        freed: dict[Context, float] = defaultdict(float)
        for ngram, count in of_order.items():
            totals[ngram[:-1]] += count
            freed[ngram[:-1]] += discounts[min(count, 3)]
        backoff |= {context: mass / totals[context] for context, mass in freed.items()}
        for ngram, count in of_order.items():
            context = ngram[:-1]
            shorter = uniform if n == 1 else probability[ngram[1:]]
            kept = (count - discounts[min(count, 3)]) / totals[context]
            probability[ngram] = kept + backoff[context] * shorter
    probability[UNKNOWN,] = backoff[()] * uniform
    # Nothing asks for the probability of <s>; it is here for the back-off weight of the first word's context.
    probability[START,] = 10.0**START_LOG10
    return NgramModel(
        {
            ngram: Entry(math.log(p), math.log(backoff.get(ngram, 1.0)))
            for ngram, p in probability.items()
        }
    )


def _counts(texts: Iterable[str], order: int) -> list[Counter[Context]]:
    """How often each n-gram of 1 to `order` words stands in `<s> text </s>`."""
    counts: list[Counter[Context]] = [Counter() for _ in range(order)]
    for text in texts:
        words = text.split()
        for reserved in {START, END, UNKNOWN}.intersection(words):
            raise InputError(f"the text {text[:60]!r} has the word {reserved}: take it out")
        sentence = (START, *words, END)
        for n in range(1, order + 1) if words else ():
            for i in range(len(sentence) - n + 1):
                counts[n - 1][sentence[i : i + n]] += 1
    if not counts[0]:
        raise InputError("a language model of no words: give texts that are not empty")
    return counts


def _adjusted(counts: Sequence[Counter[Context]]) -> list[Counter[Context]]:
    """`a` of every n-gram: see above. `<s>` alone has none."""
    adjusted = []
    for n, of_order in enumerate(counts, 1):
        if n < len(counts):
            before = Counter(ngram[1:] for ngram in counts[n])
            of_order = Counter(
                {
                    ngram: count if ngram[0] == START else before[ngram]
                    for ngram, count in of_order.items()
                }
            )
        del of_order[START,]
        adjusted.append(of_order)
    return adjusted


def _discounts(counts: Counter[Context]) -> tuple[float, ...]:
    """`D(0), D(1), D(2), D(3)` of an order."""
    t = Counter(counts.values())
    if all(t[k] for k in (1, 2, 3)):
        discounts = tuple(
            k - (k + 1) * t[1] * t[k + 1] / ((t[1] + 2 * t[2]) * t[k]) for k in (1, 2, 3)
        )
        if all(0.0 < d <= k for k, d in enumerate(discounts, 1)):
            return (0.0, *discounts)
    return (0.0, *FALLBACK_DISCOUNTS)
