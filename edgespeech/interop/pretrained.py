"""A model as a folder: `model.json`, `weights.safetensors`, `tokenizer.json`; nothing in it is executed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edgespeech.conversion.layers import mixer_layers
from edgespeech.data.corpus import write_atomically
from edgespeech.data.tokenizer import Tokenizer, load_tokenizer
from edgespeech.errors import InputError
from edgespeech.interop.moonshine_tokenizer import PieceTokenizer, load_piece_tokenizer
from edgespeech.interop.tensors import named_params, require_tensors
from edgespeech.models.moonshine import Moonshine, MoonshineConfig
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA, LPAConfig, harden
from edgespeech.nn.rotary import RotarySelfAttention
from edgespeech.nn.token_mixer_controls import WINDOWED, Removed, sliding_window
from edgespeech.ops.features import SpecAugmentConfig

FORMAT = 1
FAMILIES = {"wav2vec2": Wav2Vec2, "moonshine": Moonshine}
Model = Wav2Vec2 | Moonshine
AnyTokenizer = Tokenizer | PieceTokenizer


def save_pretrained(
    folder: Path, model: Model, tokenizer: AnyTokenizer, about: dict[str, Any]
) -> None:
    """Writes a model; LPA layers are saved as hard, which is how they are loaded.

    Args:
        folder: made when missing; `model.json` is written last, so that a half-written folder does not load.
        model: teacher or hybrid.
        tokenizer: of its tokens.
        about: what a reader may want to know (data, WER, date), plain JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.json"
    path.unlink(missing_ok=True)
    tokenizer.save(folder)
    weights = {name: np.asarray(value[...]) for name, value in named_params(model).items()}
    save_file(weights, folder / "weights.safetensors")
    description = {
        "format": FORMAT,
        "family": next(name for name, kind in FAMILIES.items() if isinstance(model, kind)),
        "config": dataclasses.asdict(model.config),
        "mixers": [_describe(layer.mixer) for layer in mixer_layers(model).values()],
        "about": about,
    }
    text = json.dumps(description, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def load_pretrained(folder: Path) -> tuple[Model, AnyTokenizer, dict[str, Any]]:
    """Reads what `save_pretrained` wrote: model, tokenizer, about.

    Raises:
        InputError: a file is missing or damaged, or the weights are not those that `model.json` describes (the message
            names the tensors).
    """
    path = folder / "model.json"
    try:
        description = json.loads(path.read_text())
        if description["format"] != FORMAT or description["family"] not in FAMILIES:
            raise InputError(
                f"{path} is of format {description['format']}, family {description['family']!r}: this version reads "
                f"format {FORMAT} of the families {', '.join(map(repr, FAMILIES))}"
            )
        model = _new_model(description["family"], description["config"])
        layers = mixer_layers(model).values()
        for layer, mixer in zip(layers, description["mixers"], strict=True):
            layer.mixer = _build(layer.mixer, mixer)
        weights = load_file(folder / "weights.safetensors")
    except FileNotFoundError as error:
        names = ("model.json", "weights.safetensors")
        missing = next((name for name in names if not (folder / name).exists()), names[0])
        raise InputError(
            f"{folder / missing} is missing: name a folder that holds a saved model (model.json, weights.safetensors, "
            "tokenizer.json), such as WORKDIR/teacher"
        ) from error
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{folder} does not hold a readable model ({error!r}): save it again"
        ) from error
    params = named_params(model)
    require_tensors(
        {name: param.shape for name, param in params.items()},
        weights,
        misfit=f"{folder}/weights.safetensors belongs to another model",
        fix="save the model again",
    )
    for name, param in params.items():
        param[...] = jax.numpy.asarray(weights[name])
    load = load_tokenizer if isinstance(model, Wav2Vec2) else load_piece_tokenizer
    return model, load(folder), description["about"]


def _new_model(family: str, config: dict[str, Any]) -> Model:
    if family == "moonshine":
        return Moonshine(MoonshineConfig(**config), rngs=nnx.Rngs(0))
    augment = SpecAugmentConfig(**config.pop("spec_augment"))
    return Wav2Vec2(Wav2Vec2Config(**config, spec_augment=augment), rngs=nnx.Rngs(0))


def _describe(mixer: nnx.Module) -> dict[str, Any]:
    if isinstance(mixer, LPA):
        return {"kind": "lpa", "config": dataclasses.asdict(mixer.config)}
    if isinstance(mixer, WINDOWED):
        return {"kind": "sliding_window", "window": mixer.window}
    if isinstance(mixer, Removed):
        return {"kind": "removed"}
    if isinstance(mixer, SelfAttention | RotarySelfAttention):
        return {"kind": "attention"}
    raise TypeError(f"cannot save a mixer of type {type(mixer).__name__}")


def _build(
    attention: SelfAttention | RotarySelfAttention, description: dict[str, Any]
) -> nnx.Module:
    """The mixer that a description names, in the size of the attention that stands in its place."""
    kind = description["kind"]
    if kind == "attention":
        return attention
    if kind == "lpa":
        lpa = LPA.from_attention(attention, LPAConfig(**description["config"]), rngs=nnx.Rngs(0))
        return harden(lpa)
    if kind == "sliding_window":
        return sliding_window(attention, description["window"], rngs=nnx.Rngs(0))
    if kind == "removed":
        return Removed()
    raise InputError(f"model.json names a mixer of kind {kind!r}, which this version does not know")
