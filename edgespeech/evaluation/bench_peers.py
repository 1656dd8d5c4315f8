"""Recognisers of other projects (peers), behind one interface.

They run with the settings that they have by default, in English. What they need is installed and downloaded by the
user: nothing of it is a part of this package.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgespeech.data.audio import to_int16
from edgespeech.errors import InputError
from edgespeech.types import SAMPLE_RATE

LANGUAGE = "en"


class Peer(ABC):
    """A recogniser of another project.

    Attributes:
        name: of its package on PyPI.
        module: what is imported.
        needs: what `--peer_model` has to name; empty where the package holds a model.

    Args:
        model: folder or file of the model; None: that of the package.
    """

    name: str
    module: str
    needs: str = ""
    bits: int | None = None

    def __init__(self, model: Path | None = None):
        self.model = model

    @property
    def version(self) -> str:
        """Of the installed package."""
        return importlib.metadata.version(self.name)

    @property
    def model_bytes(self) -> int:
        """All files of the model's folder, or the one file."""
        path = self._model_path()
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        return sum(file.stat().st_size for file in files)

    @abstractmethod
    def load(self, threads: int) -> None:
        """Makes it ready."""

    @abstractmethod
    def transcribe(self, samples: np.ndarray) -> str:
        """Text of a recording, float32 `[t]` in [-1, 1] at 16 kHz."""

    def _model_path(self) -> Path:
        """Where the model lies; a package with a model of its own says where."""
        assert self.model is not None
        return self.model

    def _import(self) -> Any:
        return importlib.import_module(self.module)

    def _package_folder(self) -> Path:
        spec = importlib.util.find_spec(self.module)
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parent


class MoonshineCpp(Peer):
    """Moonshine base in ONNX Runtime, from C++; the package holds an English model."""

    name, module = "moonshine-cpp", "moonshine_cpp"

    def _model_path(self) -> Path:
        return self.model or self._package_folder() / "models" / "base-en"

    def load(self, threads: int) -> None:
        """The library takes the cores that the process may use."""
        module = self._import()
        self._library = module.moonshine_lib
        self._loaded = module.MoonshineModel(model_dir_path=str(self._model_path()))

    def transcribe(self, samples: np.ndarray) -> str:
        """By the library's C function: the Python method of 0.1.4 names a type that ctypes does not have."""
        audio, text = np.ascontiguousarray(samples, np.float32), ctypes.c_char_p()
        error = self._library.moonshine_transcribe(
            self._loaded.model_handle,
            audio.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            audio.size,
            ctypes.byref(text),
        )
        if error:
            raise RuntimeError(f"moonshine_transcribe returned {error}")
        found = (text.value or b"").decode()
        self._library.moonshine_free_text(text)
        return found


class PocketSphinx(Peer):
    """Hidden Markov models with a trigram, one thread; the package holds an English model."""

    name, module = "pocketsphinx", "pocketsphinx"

    def _model_path(self) -> Path:
        return self.model or self._package_folder() / "model" / "en-us"

    def load(self, threads: int) -> None:
        """A folder is laid out as the package's `model/en-us`."""
        folder = self._model_path()
        self._decoder = self._import().Decoder(
            hmm=str(folder / "en-us"),
            lm=str(folder / "en-us.lm.bin"),
            dict=str(folder / "cmudict-en-us.dict"),
            samprate=SAMPLE_RATE,
            loglevel="FATAL",
        )

    def transcribe(self, samples: np.ndarray) -> str:
        """The recording as one utterance, its mean taken over all of it."""
        self._decoder.reinit_feat()  # the noise of the recording before would go on counting
        self._decoder.start_utt()
        self._decoder.process_raw(to_int16(samples).tobytes(), full_utt=True)
        self._decoder.end_utt()
        best = self._decoder.hyp()
        return "" if best is None else best.hypstr


class Vosk(Peer):
    """Kaldi's time-delay networks, one thread."""

    name, module, needs = "vosk", "vosk", "the folder of a Vosk model"

    def load(self, threads: int) -> None:
        """Without Kaldi's log."""
        self._vosk = self._import()
        self._vosk.SetLogLevel(-1)
        self._loaded = self._vosk.Model(str(self._model_path()))

    def transcribe(self, samples: np.ndarray) -> str:
        """In blocks of a quarter of a second; a block that ends an utterance brings its text."""
        recogniser = self._vosk.KaldiRecognizer(self._loaded, SAMPLE_RATE)
        pcm, size = to_int16(samples), SAMPLE_RATE // 4
        blocks = (pcm[start : start + size].tobytes() for start in range(0, len(pcm), size))
        found = [recogniser.Result() for block in blocks if recogniser.AcceptWaveform(block)]
        found.append(recogniser.FinalResult())
        return " ".join(filter(None, (json.loads(text)["text"] for text in found)))


class WhisperCpp(Peer):
    """Whisper in whisper.cpp."""

    name, module, needs = "pywhispercpp", "pywhispercpp.model", "a ggml file of Whisper"

    def load(self, threads: int) -> None:
        """Greedy search, the package's default."""
        self._loaded = self._import().Model(
            str(self._model_path()),
            n_threads=threads,
            language=LANGUAGE,
            print_progress=False,
            print_realtime=False,
            redirect_whispercpp_logs_to=None,
        )

    def transcribe(self, samples: np.ndarray) -> str:
        """The texts of all segments."""
        segments = self._loaded.transcribe(np.float32(samples))
        return " ".join(segment.text.strip() for segment in segments)


class FasterWhisper(Peer):
    """Whisper in CTranslate2."""

    name, module = "faster-whisper", "faster_whisper"
    needs = "the folder of a Whisper that was converted for CTranslate2"

    def load(self, threads: int) -> None:
        """In the precision that the model was converted to."""
        self._loaded = self._import().WhisperModel(
            str(self._model_path()), device="cpu", cpu_threads=threads, local_files_only=True
        )

    def transcribe(self, samples: np.ndarray) -> str:
        """By beam search, the package's default; it searches while the segments are read."""
        segments, _ = self._loaded.transcribe(np.float32(samples), language=LANGUAGE)
        return " ".join(segment.text.strip() for segment in segments)


PEERS = {peer.name: peer for peer in (MoonshineCpp, PocketSphinx, Vosk, WhisperCpp, FasterWhisper)}


def find_peers(models: Mapping[str, Path]) -> tuple[list[Peer], list[str]]:
    """The peers that can run here, and a sentence on each that cannot.

    Args:
        models: folder or file of a peer's model, by its name.

    Raises:
        InputError: a name that is no peer, or a path where nothing is.
    """
    for name, path in models.items():
        if name not in PEERS:
            raise InputError(f"--peer_model={name}:{path}: the peers are {', '.join(PEERS)}")
        if not path.exists():
            raise InputError(
                f"--peer_model={name}:{path}: nothing is there; name what was downloaded"
            )
    found: list[Peer] = []
    absent: list[str] = []
    for name, peer in PEERS.items():
        if importlib.util.find_spec(peer.module.partition(".")[0]) is None:
            absent.append(f"{name} is not installed: pip install {name}")
        elif peer.needs and name not in models:
            absent.append(f"{name} has no model: --peer_model={name}:PATH, {peer.needs}")
        else:
            found.append(peer(models.get(name)))
    return found, absent
