"""A model with exits as one file for each segment, so that a device computes no more than it needs.

`embed` takes `audio [1 t]` and `length [1]` and gives `x [1 n d]` and `frames [1]`. `exit_1`, `exit_2`, ... take `x`
and `frames`, and give the next `x` and the exit's `logits [1 n v]`. The device runs them in order and stops at the exit
whose logits satisfy it; what it asks of them is its own rule, such as the mean entropy of `inference.exit_criteria`.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.data.tokenizer import Tokenizer
from edgespeech.errors import InputError
from edgespeech.interop.exported import (
    SUFFIXES,
    Exported,
    Run,
    check_choice,
    load_run,
    manifest_path,
    model_facts,
    store,
    write_manifest,
)
from edgespeech.models.splitformer import Splitformer
from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits

EXITS = "exits"
MANIFEST = manifest_path(Path(EXITS)).name  # exits.manifest.json
ExitsModel: TypeAlias = Splitformer | Wav2Vec2Exits


def export_exits(
    model: ExitsModel,
    tokenizer: Tokenizer,
    about: dict[str, Any],
    folder: Path,
    *,
    form: str,
    seconds: float,
    int8: bool = False,
) -> dict[str, Any]:
    """Writes the segments and `exits.manifest.json`, which names them in order; returns the manifest.

    Arguments and errors are those of `exported.export`.
    """
    samples, n = check_choice(model, form, seconds, int8)
    length = jax.ShapeDtypeStruct((1,), jnp.int32)
    inputs = {"audio": jax.ShapeDtypeStruct((1, samples), jnp.float32), "length": length}
    between = jax.ShapeDtypeStruct((1, n, model.config.width), jnp.float32)
    segments = {"embed": (_function(model, _embed), inputs, ("x", "frames"))}
    for number, parts in enumerate(zip(model.blocks, model.heads, strict=True), 1):
        function = _function(parts, _segment)
        segments[f"exit_{number}"] = (
            function,
            {"x": between, "frames": length},
            ("next_x", "logits"),
        )
    files = []
    for name, (function, shapes, outputs) in segments.items():
        path = folder / f"{name}{'.int8' if int8 else ''}{SUFFIXES[form]}"
        size = store(path, function, shapes, outputs, form, int8)
        files.append(
            {"file": path.name, "bytes": size, "inputs": list(shapes), "outputs": list(outputs)}
        )
    manifest = {
        "segments": files,
        "samples": samples,
        "frames": n,
        "width": model.config.width,
        **model_facts(model, tokenizer, about, form, int8),
    }
    write_manifest(folder / EXITS, manifest)
    return manifest


def read_exits_manifest(folder: Path) -> dict[str, Any]:
    """`exits.manifest.json`.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} holds no readable {MANIFEST} ({error}): export again"
        ) from error


def run_exits(folder: Path, audio: np.ndarray) -> Iterator[np.ndarray]:
    """Logits `[n v]` of the valid frames of audio `[t]`, exit after exit; a segment runs when its logits are asked for.

    Raises:
        InputError: the audio is longer than the files' length, or a file is missing or damaged.
    """
    manifest = read_exits_manifest(folder)
    if len(audio) > manifest["samples"]:
        raise InputError(
            f"audio of {len(audio)} samples for a model of {manifest['samples']}: export it with more --seconds"
        )
    embed, *exits = _load_segments(folder, manifest)
    padded = np.pad(np.float32(audio), (0, manifest["samples"] - len(audio)))[None]
    x, frames = embed(padded, np.array([len(audio)], np.int32))
    for segment in exits:
        x, logits = segment(x, frames)
        yield np.asarray(logits)[0, : int(np.asarray(frames)[0])]


def open_exit(folder: Path, number: int, threads: int | None = None) -> Exported:
    """The segments up to an exit, as if they were one file that ends there.

    Args:
        folder: of the segments.
        number: of the exit, from 1.
        threads: as of `open_exported`.

    Raises:
        InputError: a file is missing or damaged, or there is no such exit.
    """
    manifest = exit_manifest(folder, number)
    embed, *exits = _load_segments(folder, manifest, threads)

    def run(audio, length):
        x, frames = embed(audio, length)
        logits = None
        for segment in exits:
            x, logits = segment(x, frames)
        return logits, frames

    return Exported(run, manifest)


def exit_manifest(folder: Path, number: int) -> dict[str, Any]:
    """What `open_exit` knows, as the manifest of one file; no segment is opened.

    Raises:
        InputError: the manifest is missing or damaged, or there is no such exit.
    """
    manifest = read_exits_manifest(folder)
    last = len(manifest["segments"]) - 1
    if not 1 <= number <= last:
        raise InputError(f"{folder} has no exit {number}: choose 1 to {last}")
    segments = manifest["segments"][: number + 1]
    return manifest | {
        "segments": segments,
        "bytes": sum(segment["bytes"] for segment in segments),
        "seconds": manifest["samples"] / manifest["sample_rate"],
        "inputs": {"audio": {"shape": [1, manifest["samples"]]}},
    }


def _load_segments(
    folder: Path, manifest: dict[str, Any], threads: int | None = None
) -> Iterator[Run]:
    return (
        load_run(folder / segment["file"], manifest["format"], threads)
        for segment in manifest["segments"]
    )


def _function(module: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    graphdef, state = nnx.split(module)
    return lambda *arrays: call(nnx.merge(graphdef, state), *arrays)


def _embed(model: ExitsModel, audio, lengths):
    return model.embed(audio, lengths)


def _segment(parts, x, frames):
    block, head = parts
    x = block(x, frames)
    return x, head(x, frames)
