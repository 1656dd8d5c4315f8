"""A model as a folder: `model.json`, `weights.safetensors`, `tokenizer.json`; nothing in it is executed."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edgespeech.conversion.layers import mixer_layers
from edgespeech.data.corpus import write_atomically
from edgespeech.data.tokenizer import Tokenizer, load_tokenizer
from edgespeech.errors import InputError
from edgespeech.interop.moonshine_tokenizer import PieceTokenizer, load_piece_tokenizer
from edgespeech.interop.tensors import named_variables, require_tensors, sketch, zeroed
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.models.edge_conformer_config import EdgeConformerConfig
from edgespeech.models.moonshine import Moonshine, MoonshineConfig
from edgespeech.models.moonshine_ctc import MoonshineCTC, MoonshineCTCConfig
from edgespeech.models.sepformer import SepFormer, SepFormerConfig
from edgespeech.models.splitformer import Splitformer, SplitformerConfig
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits, Wav2Vec2ExitsConfig
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.chunk_attention import ChunkAttention
from edgespeech.nn.lpa import LPA, LPAConfig, harden
from edgespeech.nn.relative_attention import RelativeSelfAttention
from edgespeech.nn.rotary import RotarySelfAttention
from edgespeech.nn.streaming_lpa import StreamingLPA
from edgespeech.nn.summary_mixing import SummaryMixing
from edgespeech.nn.token_mixer_controls import WINDOWED, Removed, sliding_window
from edgespeech.ops.features import SpecAugmentConfig

FORMAT = 1
Model = (
    Wav2Vec2 | Wav2Vec2Exits | Moonshine | MoonshineCTC | EdgeConformer | Splitformer | SepFormer
)
AnyTokenizer = Tokenizer | PieceTokenizer
# What contents of `model.json` other than expected lead to, in whatever part of a model meets them first.
MALFORMED = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(AssertionError, RecursionError),
)
Attention = SelfAttention | RotarySelfAttention | RelativeSelfAttention | ChunkAttention


# Configurations inside configurations.
NESTED = {"spec_augment": SpecAugmentConfig, "lpa": LPAConfig, "encoder": Wav2Vec2Config}


class Family(NamedTuple):
    """How the models of one family are made again.

    Attributes:
        model: class of the model.
        config: class of its configuration.
        load_tokenizer: reads the tokenizer of a folder; None: the family writes no text.
        create: makes the model of `(config, rngs=...)`; None: its class does.
    """

    model: type[Any]
    config: type
    load_tokenizer: Callable[[Path], AnyTokenizer] | None
    create: Callable[..., Model] | None = None


FAMILIES = {
    "wav2vec2": Family(Wav2Vec2, Wav2Vec2Config, load_tokenizer),
    "wav2vec2_exits": Family(
        Wav2Vec2Exits, Wav2Vec2ExitsConfig, load_tokenizer, Wav2Vec2Exits.create
    ),
    "moonshine": Family(Moonshine, MoonshineConfig, load_piece_tokenizer),
    "moonshine_ctc": Family(MoonshineCTC, MoonshineCTCConfig, load_tokenizer),
    "edge_conformer": Family(EdgeConformer, EdgeConformerConfig, load_tokenizer),
    "splitformer": Family(Splitformer, SplitformerConfig, load_tokenizer),
    "sepformer": Family(SepFormer, SepFormerConfig, None),
}


def save_pretrained(
    folder: Path, model: Model, tokenizer: AnyTokenizer | None, about: dict[str, Any]
) -> None:
    """Writes a model, running statistics included; LPA layers are saved as hard, which is how they are loaded.

    Args:
        folder: made when missing; `model.json` is written last, so that a half-written folder does not load.
        model: teacher or hybrid.
        tokenizer: of its tokens; None for a model that writes no text.
        about: what a reader may want to know (data, WER, date), plain JSON.
    """
    name, family = next(
        (name, family) for name, family in FAMILIES.items() if isinstance(model, family.model)
    )
    if (tokenizer is None) != (family.load_tokenizer is None):
        raise TypeError(f"a model of the family {name!r} was given the tokenizer {tokenizer!r}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.json"
    path.unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save(folder)
    weights = {name: np.asarray(value[...]) for name, value in named_variables(model).items()}
    save_file(weights, folder / "weights.safetensors")
    description = {
        "format": FORMAT,
        "family": name,
        "config": dataclasses.asdict(model.config),
        "mixers": [_describe(layer.mixer) for layer in mixer_layers(model).values()],
        "about": about,
    }
    text = json.dumps(description, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def load_pretrained(folder: Path) -> tuple[Model, AnyTokenizer | None, dict[str, Any]]:
    """Reads what `save_pretrained` wrote: model, tokenizer (None for a model that writes no text), about.

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
        family = FAMILIES[description["family"]]
        about = description["about"]
        weights = load_file(folder / "weights.safetensors")
        sizes = {key: description[key] for key in ("config", "mixers")}
        model = zeroed(sketch(lambda: _new_model(family, description), path, sizes, weights))
    except FileNotFoundError as error:
        names = ("model.json", "weights.safetensors")
        missing = next((name for name in names if not (folder / name).exists()), names[0])
        raise InputError(
            f"{folder / missing} is missing: name a folder that holds a saved model (model.json, weights.safetensors, "
            "tokenizer.json), such as WORKDIR/teacher"
        ) from error
    except InputError:
        raise
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise InputError(
            f"{folder} does not hold a readable model ({error!r}): save it again"
        ) from error
    variables = named_variables(model)
    require_tensors(
        {name: variable.shape for name, variable in variables.items()},
        weights,
        misfit=f"{folder}/weights.safetensors belongs to another model",
        fix="save the model again",
    )
    for name, variable in variables.items():
        variable[...] = jnp.asarray(weights[name], variable.dtype)
    tokenizer = family.load_tokenizer(folder) if family.load_tokenizer else None
    if tokenizer is None or isinstance(model, SepFormer):
        return model, tokenizer, about
    if tokenizer.vocab_size < model.config.vocab_size:
        raise InputError(
            f"{folder} has a tokenizer of {tokenizer.vocab_size} tokens and a model of {model.config.vocab_size}: save "
            "both again"
        )
    return model, tokenizer, about


def _new_model(family: Family, description: dict[str, Any]) -> Model:
    """The model that a description describes, with any weights."""
    create: Callable[..., Model] = family.create or family.model
    model = create(_config(family.config, description["config"]), rngs=nnx.Rngs(0))
    layers = mixer_layers(model).values()
    for layer, mixer in zip(layers, description["mixers"], strict=True):
        layer.mixer = _build(layer.mixer, mixer)
    return model


def _config(kind: type, values: dict[str, Any]) -> Any:
    fields = {field.name for field in dataclasses.fields(kind)}
    parts = {name: _config(NESTED[name], values[name]) for name in NESTED.keys() & fields}
    # JSON has lists alone; a configuration has tuples.
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**plain | parts)


def _describe(mixer: nnx.Module) -> dict[str, Any]:
    if isinstance(mixer, LPA):
        kind = "streaming_lpa" if mixer.causal else "lpa"
        return {"kind": kind, "config": dataclasses.asdict(mixer.config)}
    if isinstance(mixer, WINDOWED):
        return {"kind": "sliding_window", "window": mixer.window}
    if isinstance(mixer, SummaryMixing):
        return {"kind": "summary_mixing"}
    if isinstance(mixer, Removed):
        return {"kind": "removed"}
    if isinstance(mixer, Attention):
        return {"kind": "attention"}
    raise TypeError(f"cannot save a mixer of type {type(mixer).__name__}")


def _build(mixer: Any, description: dict[str, Any]) -> nnx.Module:
    """The mixer that a description names, in the size of the one that the new model has in its place."""
    kind = description["kind"]
    if kind == "attention" and isinstance(mixer, Attention):
        return mixer
    if kind in ("lpa", "streaming_lpa"):
        lpa = LPA if kind == "lpa" else StreamingLPA
        config = LPAConfig(**description["config"])
        return harden(lpa.from_attention(mixer, config, rngs=nnx.Rngs(0)))
    if kind == "summary_mixing":
        return SummaryMixing.from_attention(mixer, rngs=nnx.Rngs(0))
    if kind == "sliding_window":
        return sliding_window(mixer, description["window"], rngs=nnx.Rngs(0))
    if kind == "removed":
        return Removed()
    raise InputError(f"model.json names a mixer of kind {kind!r}, which this version does not know")
