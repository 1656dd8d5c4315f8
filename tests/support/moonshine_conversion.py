"""Noise with token ids for texts: what a tiny Moonshine is converted on."""

import numpy as np

from edgespeech.conversion.labels import Labelled, TokenIds
from edgespeech.data.batching import BatchConfig, BatchSource
from edgespeech.data.corpus import Corpus, Utterance
from edgespeech.interop.moonshine_tokenizer import SPACE, PieceTokenizer
from edgespeech.models.moonshine import Moonshine
from tests.support.modules import randomize
from tests.support.moonshine import tiny_moonshine


class NoiseCorpus(Corpus):
    """Utterances of noise, 0.25 to 0.4 s long, each of its own colour."""

    kind = "noise"

    def __init__(self, count: int = 5, seed: int = 0, name: str = "train"):
        self.name = name
        self._seed = seed
        samples = np.random.default_rng(seed).integers(4000, 6400, count)
        self.utterances = tuple(
            Utterance(f"{row % 2 + 1}-1-{row:04d}", str(row % 2 + 1), "NO TEXT", int(n))
            for row, n in enumerate(samples)
        )

    def audio(self, index: int) -> np.ndarray:
        random = np.random.default_rng([self._seed, index])
        noise = random.normal(size=self.utterances[index].num_samples + 8)
        kernel = random.normal(size=9) / 20
        return np.convolve(noise, kernel, "valid").astype(np.float32)


def letters() -> PieceTokenizer:
    """Tokens 3 to 10 are the words A to H."""
    words = [f"{SPACE}{letter}".encode() for letter in "ABCDEFGH"]
    return PieceTokenizer([b"?", None, None, *words], vocab_size=11)


def talkative_moonshine() -> Moonshine:
    """A tiny model whose texts differ, and of which some end by themselves."""
    return randomize(tiny_moonshine(scale=0.0), 41, 0.6)


def noise_source(corpus: Corpus | None = None, batch_multiple: int = 1) -> BatchSource:
    """Batches of one shape: three rows of 0.4 s; the second of an epoch of five has a filler row.

    With `batch_multiple` 4 there are four rows, and three filler rows in the second batch.
    """
    corpus = corpus or NoiseCorpus()
    random = np.random.default_rng(7)
    texts = {
        u.id: random.integers(3, 11, random.integers(0, 4)).tolist() for u in corpus.utterances
    }
    config = BatchConfig(
        batch_seconds=1.3 if batch_multiple == 1 else 0.45 * batch_multiple,
        num_buckets=1,
        batch_multiple=batch_multiple,
    )
    return BatchSource(Labelled(corpus, texts, []), TokenIds(), config)
