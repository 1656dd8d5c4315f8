"""Files that `edgespeech export` wrote, as recognisers to be timed: whole models, streaming steps, exits."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgespeech import __version__
from edgespeech.errors import InputError
from edgespeech.inference.words import text_of, words_of_path
from edgespeech.interop.exported import Exported, open_exported, read_manifest
from edgespeech.interop.exported_exits import MANIFEST, exit_manifest, open_exit
from edgespeech.interop.exported_exits import read_exits_manifest as read_exits
from edgespeech.interop.exported_stream import ExportedStream


class ExportedFile:
    """A whole model, or the step of a streaming one, decoded greedily.

    Args:
        path: of the file.
        name: in tables; None: the file's own.

    Attributes:
        seconds: of audio that a call takes: the file's whole length, or a step's chunk.
        most_samples: of a recording; None: a step takes any.

    Raises:
        InputError: the file's manifest is missing or damaged.
    """

    def __init__(self, path: str | Path, name: str | None = None):
        self._path = Path(path)
        self._set_facts(read_manifest(self._path), name or self._path.name)

    def _set_facts(self, manifest: dict[str, Any], name: str) -> None:
        self.name = name
        self.version = f"edgespeech {__version__}"
        self.bits, self.model_bytes = manifest["bits"], manifest["bytes"]
        self.seconds = manifest["seconds"]
        self.samples = manifest["inputs"]["audio"]["shape"][1]
        self._is_step = "state" in manifest
        self.most_samples = None if self._is_step else self.samples

    def _open(self, threads: int | None) -> Exported:
        return open_exported(self._path, threads)

    def load(self, threads: int | None) -> None:
        """Opens the file in its own runtime."""
        if self._is_step:
            self._stream = ExportedStream(self._path, threads=threads)
        else:
            self._whole = self._open(threads)

    def transcribe(self, samples: np.ndarray) -> str:
        """Text of the best path; a step takes the recording chunk by chunk."""
        if self._is_step:
            self._stream.reset()
            updates = self._stream.feed(samples), self._stream.close()
            return text_of(word for update in updates for word in update.final)
        manifest = self._whole.manifest
        path = self._whole.logits(samples).argmax(-1)
        return text_of(words_of_path(path, manifest["vocabulary"], manifest["frame_seconds"]))

    def prepare(self, audio: np.ndarray) -> Callable[[], Any]:
        """A call that computes logits of audio `[1 t]` as long as the file, or as a chunk."""
        if self._is_step:
            return lambda: self._stream.step(audio[0])
        return functools.partial(self._whole.run, audio, np.array([audio.shape[1]], np.int32))


class ExportedExit(ExportedFile):
    """The segments of a model with exits up to one of them: what a device computes that always leaves there.

    Args:
        folder: of the segments.
        number: of the exit, from 1.
        name: of the folder, in tables.

    Raises:
        InputError: the manifest is missing or damaged, or there is no such exit.
    """

    def __init__(self, folder: Path, number: int, name: str):
        self._path, self._number = folder, number
        self._set_facts(exit_manifest(folder, number), f"{name}, exit {number}")

    def _open(self, threads: int | None) -> Exported:
        return open_exit(self._path, self._number, threads)


def open_files(paths: Sequence[str | Path]) -> list[ExportedFile]:
    """Exported files, and of every folder that `export --exits` wrote each exit; two never have one name.

    Args:
        paths: of files and folders.

    Raises:
        InputError: a manifest is missing or damaged, or a path comes twice.
    """
    places = [Path(os.path.abspath(path)) for path in paths]
    for place in places:
        if places.count(place) > 1:
            raise InputError(f"{place} is named twice: name every file once")
    files = []
    for place, name in zip(places, _names(places), strict=True):
        if (place / MANIFEST).exists():
            exits = range(1, len(read_exits(place)["segments"]))
            files += [ExportedExit(place, number, name) for number in exits]
        else:
            files.append(ExportedFile(place, name))
    return files


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of files: their last parts, as many as tell them all apart."""
    most = max((len(path.parts) for path in paths), default=1)
    for count in range(1, most):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def matching_int8(files: Sequence[tuple[str, int | None]]) -> list[tuple[int, int]]:
    """Places of files of 32 bits with those of the same ones in 8 bits, whose names have `.int8` in them.

    Args:
        files: name and bits of each.
    """
    whole = {name: place for place, (name, bits) in enumerate(files) if bits == 32}
    return [
        (whole[name.replace(".int8", "")], place)
        for place, (name, bits) in enumerate(files)
        if bits == 8 and name.replace(".int8", "") in whole
    ]
