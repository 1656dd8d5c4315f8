"""A corpus of tones, a model of three layers, and what tests of training and conversion do with them."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import soundfile
from flax import nnx

from edgespeech.data.batching import Batch, BatchConfig, BatchSource
from edgespeech.data.corpus import Corpus, Utterance
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from edgespeech.training.loop import LoopConfig

ROOT = Path(__file__).parents[2]  # of the repository: where programs are started
SAMPLE_RATE = 16_000
LETTER = 2000  # samples of one letter: 125 ms, three frames of 40 ms
LETTERS = "ABCDE"

TINY_SIZES = {
    "num_layers": 3,
    "width": 16,
    "num_heads": 2,
    "ffn_width": 32,
    "front_channels": 16,
    "num_mels": 20,
    "conv_blocks": 1,
    "position_kernel": 3,
    "position_groups": 16,
}

QUIET = LoopConfig(save_every=1000, log_every=1, quiet=True)


def tone(text: str) -> np.ndarray:
    """float32 `[t]`: 125 ms a letter, each a sine of its own frequency, a space is silence."""
    time = np.arange(LETTER) / SAMPLE_RATE
    parts = [
        np.zeros(LETTER)
        if letter == " "
        else 0.3 * np.sin(2 * np.pi * 400 * (1 + LETTERS.index(letter)) * time)
        for letter in text
    ]
    return np.concatenate(parts).astype(np.float32)


class ToneCorpus(Corpus):
    """Utterances of two words, such as "AB C", 0.375 or 0.5 s long."""

    kind = "tones"

    def __init__(self, count: int = 6, seed: int = 0, name: str = "train"):
        self.name = name
        random = np.random.default_rng(seed)
        texts = []
        for row in range(count):
            letters = random.permutation(list(LETTERS))
            first = letters[0] + (letters[1] if row % 3 else "")
            texts.append(f"{first} {letters[2]}")
        self.utterances = tuple(
            Utterance(f"{row % 2 + 1}-1-{row:04d}", str(row % 2 + 1), text, len(text) * LETTER)
            for row, text in enumerate(texts)
        )

    def audio(self, index: int) -> np.ndarray:
        return tone(self.utterances[index].text)


def tiny_config(**changes) -> Wav2Vec2Config:
    """Three layers of width 16 over log-mel frames of 40 ms."""
    sizes = TINY_SIZES | {"vocab_size": CharTokenizer().vocab_size} | changes
    return dataclasses.replace(Wav2Vec2Config.tiny(), **sizes)


def tiny_model(seed: int = 0, **changes) -> Wav2Vec2:
    """A model with random parameters."""
    return Wav2Vec2(tiny_config(**changes), rngs=nnx.Rngs(seed))


def tone_source(corpus: Corpus | None = None, batch_multiple: int = 1) -> BatchSource:
    """Batches of one shape: four rows of 0.56 s; the second of an epoch of six has two filler rows."""
    config = BatchConfig(batch_seconds=2.3, num_buckets=1, batch_multiple=batch_multiple)
    return BatchSource(corpus or ToneCorpus(), CharTokenizer(), config, tiny_config().num_frames)


def batch_with_filler(source: BatchSource) -> Batch:
    """The first batch that has filler rows."""
    batches = (source.batch(step) for step in range(10))
    return next(batch for batch in batches if not batch.weights.all())


def write_librispeech(root: Path, split: str, corpus: Corpus) -> Path:
    """Writes a corpus as `root/SPLIT/SPEAKER/CHAPTER/ID.wav` with its transcripts; returns the chapters' parent."""
    for index, utterance in enumerate(corpus.utterances):
        speaker, chapter, _ = utterance.id.split("-")
        folder = root / split / speaker / chapter
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{utterance.id}.wav", corpus.audio(index), SAMPLE_RATE)
        with (folder / f"{speaker}-{chapter}.trans.txt").open("a") as file:
            file.write(f"{utterance.id} {utterance.text}\n")
    return root / split


def assert_same_bits(a, b) -> None:
    """Two trees of arrays are equal bit for bit."""
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(leaves_a) == len(leaves_b)
    for x, y in zip(leaves_a, leaves_b, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes(), f"differs by up to {np.max(np.abs(x - y))}"
