"""`transcribe --mic`: a stand-in for the package sounddevice hears a known wave; a terminal shows the words."""

import dataclasses
import io
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import soxr
from flax import nnx

from edgespeech.cli import main
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.inference.live import LiveText
from edgespeech.inference.long_audio import LongAudio
from edgespeech.inference.microphone import Microphone
from edgespeech.inference.streaming import Streamer, Update
from edgespeech.inference.words import Word
from edgespeech.interop.pretrained import save_pretrained
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.models.edge_conformer_config import EdgeConformerConfig
from tests.demo.serving import CLIP, hybrid
from tests.support.modules import randomize

TOKENIZER = CharTokenizer(["<pad>", "|", "A", "B", "C"])
CONFIG = dataclasses.replace(
    EdgeConformerConfig.tiny(),
    **{
        "vocab_size": 5,
        "num_mels": 11,
        "width": 8,
        "num_layers": 1,
        "num_heads": 2,
        "ffn_width": 8,
    },
    **{"conv_kernel": 5, "chunk": 3, "left": 1},
)


class PortAudioError(Exception):
    """As sounddevice's."""


def stand_in(wave, rate, lost=0, gone=False):
    """A sounddevice whose microphone hears a wave, in blocks of 10 ms, and then Ctrl-C is pressed, or it is pulled out.

    The buffer of a block is used again for the next one, as PortAudio does.
    """

    class InputStream:
        active = True

        def __init__(self, samplerate, channels, dtype, callback):
            assert (samplerate, channels, dtype) == (rate, 1, "float32")
            self.callback = callback

        def __enter__(self):
            self.thread = threading.Thread(target=self.hear)
            self.thread.start()

        def __exit__(self, *_):
            self.thread.join()

        def hear(self):
            size = rate // 100
            buffer = np.zeros((size, 1), np.float32)
            for start in range(0, len(wave), size):
                block = wave[start : start + size]
                buffer[: len(block), 0] = block
                status = SimpleNamespace(input_overflow=start < lost * size)
                self.callback(buffer[: len(block)], len(block), None, status)
            buffer[:] = np.nan
            if gone:
                self.active = False
            else:
                time.sleep(0.2)
                os.kill(os.getpid(), signal.SIGINT)

    device = {"default_samplerate": float(rate)}
    return SimpleNamespace(
        InputStream=InputStream,
        PortAudioError=PortAudioError,
        query_devices=lambda kind: device,
    )


@pytest.fixture(scope="module")
def model():
    """Random, with logits of mean 0 over time: every token is the most likely one now and then."""
    model = randomize(EdgeConformer(CONFIG, rngs=nnx.Rngs(0)), seed=1)
    wave = speech()
    logits = nnx.jit(lambda m, x, n: m(x, n))(model, wave[None], np.array([len(wave)])).logits
    model.head.bias[...] -= logits[0].mean(0)
    return model


def speech(seconds=4.0):
    rng = np.random.default_rng(0)
    t = round(seconds * 16_000)
    level = np.repeat(10.0 ** rng.uniform(-3, -0.5, size=t // 960 + 1), 960)[:t]
    return np.clip(level * rng.normal(size=t), -0.9, 0.9).astype(np.float32)


def test_words_of_a_streaming_model(model, tmp_path, monkeypatch, capsys):
    save_pretrained(tmp_path, model, TOKENIZER, {})
    wave = speech()
    streamer = Streamer(model, TOKENIZER)
    updates = [streamer.feed({0: wave})[0], streamer.close(0)]
    wanted = [word.text for update in updates for word in update.final]
    assert len(wanted) >= 4
    monkeypatch.setitem(sys.modules, "sounddevice", stand_in(wave, 16_000, lost=3))
    before = signal.getsignal(signal.SIGINT)
    assert main(["transcribe", "--mic", f"--model={tmp_path}"]) == 0
    assert signal.getsignal(signal.SIGINT) is before
    printed = capsys.readouterr()
    assert printed.out.split() == wanted
    assert "\x1b" not in printed.out  # no terminal
    assert "listening, 0.12 s at a time" in printed.err
    assert "audio was lost 3 times" in printed.err


@pytest.mark.parametrize("gone", [False, True], ids=["ctrl-c", "unplugged"])
def test_text_of_a_model_that_hears_whole_utterances(tmp_path, monkeypatch, capsys, gone):
    model = hybrid()
    save_pretrained(tmp_path, model, CharTokenizer(), {})
    wave = soxr.resample(CLIP, 16_000, 8_000)
    sound = soxr.ResampleStream(8_000, 16_000, 1, dtype="float32").resample_chunk(wave, last=True)
    wanted = LongAudio(model, CharTokenizer()).stream([np.clip(sound, -1, 1)]).text
    assert len(wanted) >= 3
    monkeypatch.setitem(sys.modules, "sounddevice", stand_in(wave, 8_000, gone=gone))
    assert main(["transcribe", "--mic", f"--model={tmp_path}"]) == 0
    printed = capsys.readouterr()
    assert printed.out == wanted + "\n"
    assert "the text comes after Ctrl-C" in printed.err
    assert "lost" not in printed.err


# ------------------------------------------------------------------------------------------------ errors

NOWHERE = "--model=nowhere/at/all/x"  # errors of the microphone come before it is looked for


def no_device(kind):
    raise PortAudioError("Error querying device -1")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "needs the package sounddevice"),
        (SimpleNamespace(PortAudioError=PortAudioError, query_devices=no_device), "no microphone"),
    ],
)
def test_no_microphone(module, message, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    assert main(["transcribe", "--mic", NOWHERE]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "nowhere" not in error


def test_a_device_that_cannot_be_opened(monkeypatch):
    def busy(**_):
        raise PortAudioError("Device unavailable")

    module = stand_in(speech(), 16_000)
    module.InputStream = busy
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    with pytest.raises(ValueError, match=r"cannot be used \(Device unavailable\)"):
        next(Microphone().blocks(threading.Event()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to transcribe: name audio files, or give --mic"),
        (["--mic", "a.wav"], "leave out files, --format and --output"),
        (["--mic", "--format=srt"], "leave out files, --format and --output"),
        (["--mic", "--output=x"], "leave out files, --format and --output"),
    ],
)
def test_arguments(arguments, message, capsys):
    assert main(["transcribe", NOWHERE, *arguments]) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- terminal


class Terminal(io.StringIO):
    """Lines as a terminal shows them: `\\x1b[K` erases to the end of the line, `\\x1b[nD` goes n to the left."""

    def __init__(self):
        super().__init__()
        self.lines, self.column = [""], 0

    def isatty(self):
        return True

    def write(self, text):
        while text:
            if text.startswith("\x1b["):
                end = next(i for i, c in enumerate(text) if c.isalpha())
                if text[end] == "K":
                    self.lines[-1] = self.lines[-1][: self.column]
                else:
                    assert text[end] == "D"
                    self.column -= int(text[2:end])
                    assert self.column >= 0
                text = text[end + 1 :]
                continue
            if text[0] == "\n":
                self.lines.append("")
                self.column = 0
            else:
                line = self.lines[-1]
                self.lines[-1] = line[: self.column] + text[0] + line[self.column + 1 :]
                self.column += 1
                assert self.column <= 12, "beyond the edge"
            text = text[1:]


def update(*final, partial=None, endpoint=False):
    words = tuple(Word(text, 0.0, 1.0) for text in final)
    return Update(words, None if partial is None else Word(partial, 0.0, 1.0), endpoint)


def test_words_are_updated_in_place(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "12")
    text = LiveText()
    for one, lines in (
        (update(partial="TH"), ["TH"]),
        (update(partial="THE"), ["THE"]),
        (update("THE", partial="C"), ["THE C"]),
        (update(), ["THE"]),
        (update(partial="CATALOGUES"), ["THE CATALOG"]),  # as much as there is room for
        (update("CAT"), ["THE CAT"]),
        (update("SAT", partial="O"), ["THE CAT SAT"]),
        (update("ON"), ["THE CAT SAT", "ON"]),
        (update("IT", endpoint=True), ["THE CAT SAT", "ON IT", ""]),
        (update(endpoint=True), ["THE CAT SAT", "ON IT", ""]),
        (update("A", partial="B"), ["THE CAT SAT", "ON IT", "A B"]),
    ):
        text.show(one)
        assert terminal.lines == lines
