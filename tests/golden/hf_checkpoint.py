"""The checkpoint in hf_wav2vec2.npz as a folder, with other values where a test wants them."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDEN = np.load(Path(__file__).with_name("hf_wav2vec2.npz"))
TENSORS = {k.removeprefix("tensors/"): GOLDEN[k] for k in GOLDEN.files if k.startswith("tensors/")}
CONFIG = json.loads(str(GOLDEN["config"]))
IDS = {str(token): i for i, token in enumerate(GOLDEN["tokens"])}


def write(folder, tensors=TENSORS, vocab=IDS, processor=None, **config):
    """Writes the folder; returns it."""
    if tensors is not None:
        save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if vocab is not None:
        (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor or {}))
    return folder


def without(*names):
    """The tensors less some."""
    return {name: tensor for name, tensor in TENSORS.items() if name not in names}
