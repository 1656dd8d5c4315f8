"""The files of a Hugging Face checkpoint: found or downloaded, and read; nothing in them is executed."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from edgespeech.errors import InputError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def locate_checkpoint(path_or_id: str | Path) -> tuple[Path, Path]:
    """The folder of a checkpoint and the file with its weights.

    Args:
        path_or_id: the folder, one of `WEIGHT_FILES` in it, or a hub id `owner/name`, which is downloaded into
            huggingface_hub's cache unless it is there.

    Raises:
        InputError: nothing is there, or the hub cannot be read.
    """
    path = Path(path_or_id)
    if path.is_file():
        return path.parent, path
    if not path.is_dir():
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path_or_id)):
            raise InputError(
                f"{path_or_id} is missing: name a folder, its weights file, or a hub id such as "
                "facebook/wav2vec2-base-960h"
            )
        path = _download(str(path_or_id))
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path, path / name
    raise InputError(f"{path} holds neither {' nor '.join(WEIGHT_FILES)}: download the checkpoint")


def _download(repo: str) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise InputError(
            f"{repo} is not a local folder, and reading it from the hub needs huggingface_hub: install "
            "edgespeech[torch], or download the folder and name it"
        ) from error
    try:
        for weights in WEIGHT_FILES:
            folder = Path(hub.snapshot_download(repo, allow_patterns=["*.json", weights]))
            if (folder / weights).is_file():
                break
    except (OSError, ValueError) as error:  # the bases of every error of huggingface_hub
        raise InputError(
            f"{repo} is not a local folder and cannot be had from the hub ({type(error).__name__}): check the name "
            "and the network, or download the folder elsewhere and name it"
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} where an object must be")
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: download the whole checkpoint folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): download it again") from error
    return content


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors or PyTorch file, as float32.

    Raises:
        InputError: the file is damaged or holds more than tensors, or PyTorch is needed and not installed.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            torch = importlib.import_module("torch")
            state = torch.load(path, map_location="cpu", weights_only=True)
            tensors = {name: tensor.float().numpy() for name, tensor in state.items()}
        return {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    except ImportError as error:
        raise InputError(
            f"{path} needs PyTorch to be read: install edgespeech[torch], or take model.safetensors"
        ) from error
    # Of a damaged file: whatever the unpickler of tensors meets, MemoryError for a length that is none included.
    except Exception as error:
        raise InputError(
            f"{path} is not a file of tensors alone ({type(error).__name__}): download it again, or take the "
            "safetensors version"
        ) from error
