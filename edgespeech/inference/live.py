"""The words of live audio on a terminal: as they are said, or once it has ended."""

import shutil
import sys
from collections.abc import Iterable

import numpy as np

from edgespeech.data.tokenizer import Tokenizer
from edgespeech.inference.audio_blocks import resampled
from edgespeech.inference.long_audio import LongAudio
from edgespeech.inference.streaming import Streamer, Update
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.types import SAMPLE_RATE


class LiveText:
    """Words on standard output as they come: final ones stay, the open one is rewritten in place.

    Where the output is no terminal, final words are all there is. A pause of the speaker ends a line.
    """

    def __init__(self):
        self._is_terminal = sys.stdout.isatty()
        self._width = shutil.get_terminal_size().columns if self._is_terminal else sys.maxsize
        self._column = 0  # behind the last final word, where the cursor stays

    def show(self, update: Update) -> None:
        """Writes what is new."""
        text = "\x1b[K" if self._is_terminal else ""  # erases the open word
        for word in update.final:
            if self._column and self._column + 1 + len(word.text) > self._width:
                text, self._column = text + "\n", 0
            text += self._spaced(word.text)
            self._column += len(self._spaced(word.text))
        if update.endpoint and self._column:
            text, self._column = text + "\n", 0
        if self._is_terminal and update.partial is not None:
            part = self._spaced(update.partial.text)[: self._width - self._column - 1]
            text += f"{part}\x1b[{len(part)}D" if part else ""
        sys.stdout.write(text)
        sys.stdout.flush()

    def _spaced(self, word: str) -> str:
        return f" {word}" if self._column else word


def write_words(
    model: EdgeConformer, tokenizer: Tokenizer, blocks: Iterable[np.ndarray], rate: int
) -> None:
    """Writes words to standard output as they are said.

    Args:
        model: with the chunks that it is to stream with.
        tokenizer: of its vocabulary.
        blocks: float32 `[any]` in [-1, 1], mono; taken once the model is compiled.
        rate: of the blocks, Hz.
    """
    streamer = Streamer(model, tokenizer)
    # Compiled before anybody speaks.
    streamer.feed({0: np.zeros(model.chunk, np.float32)})
    streamer.reset(0)
    print(f"listening, {streamer.chunk_seconds:g} s at a time; Ctrl-C ends it", file=sys.stderr)
    text = LiveText()
    for block in blocks:
        text.show(streamer.feed({0: block}, rate)[0])
    text.show(streamer.close(0))


def write_text(transcribe: LongAudio, blocks: Iterable[np.ndarray], rate: int) -> None:
    """Writes the text to standard output once the audio has ended; finished segments are heard while it goes on.

    Args:
        transcribe: of a model that hears whole utterances.
        blocks: as of `write_words`.
        rate: of the blocks, Hz.
    """
    print(
        "recording; this model hears whole utterances: the text comes after Ctrl-C", file=sys.stderr
    )
    audio = resampled((block[None] for block in blocks), 1, rate, SAMPLE_RATE)
    print(transcribe.stream(np.clip(block[0], -1.0, 1.0) for block in audio).text)
