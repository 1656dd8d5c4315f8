"""A model with exits as a folder: `model.json`, `weights.safetensors`, `tokenizer.json`; nothing in it is executed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edgespeech.data.corpus import write_atomically
from edgespeech.data.tokenizer import Tokenizer, load_tokenizer
from edgespeech.errors import InputError
from edgespeech.interop.pretrained import FORMAT
from edgespeech.interop.tensors import require_tensors
from edgespeech.models.splitformer import Splitformer, SplitformerConfig
from edgespeech.ops.features import SpecAugmentConfig

FAMILY = "splitformer"


def save_exit_model(
    folder: Path, model: Splitformer, tokenizer: Tokenizer, about: dict[str, Any]
) -> None:
    """Writes a model with the running statistics of its batch norms.

    Args:
        folder: made when missing; `model.json` is written last, so that a half-written folder does not load.
        model: with attention in every mixer.
        tokenizer: of its tokens.
        about: what a reader may want to know (data, WER, date), plain JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.json"
    path.unlink(missing_ok=True)
    tokenizer.save(folder)
    tensors = {name: np.asarray(value[...]) for name, value in named_variables(model).items()}
    save_file(tensors, folder / "weights.safetensors")
    description = {
        "format": FORMAT,
        "family": FAMILY,
        "config": dataclasses.asdict(model.config),
        "about": about,
    }
    text = json.dumps(description, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def load_exit_model(folder: Path) -> tuple[Splitformer, Tokenizer, dict[str, Any]]:
    """Reads what `save_exit_model` wrote: model, tokenizer, about.

    Raises:
        InputError: a file is missing or damaged, or the weights are not those that `model.json` describes (the message
            names the tensors).
    """
    path = folder / "model.json"
    try:
        description = json.loads(path.read_text())
        if description["format"] != FORMAT or description["family"] != FAMILY:
            raise InputError(
                f"{path} is of format {description['format']}, family {description['family']!r}: needed are format "
                f"{FORMAT} and {FAMILY!r}"
            )
        config = description["config"]
        augment = SpecAugmentConfig(**config.pop("spec_augment"))
        model = Splitformer(SplitformerConfig(**config, spec_augment=augment), rngs=nnx.Rngs(0))
        tensors = load_file(folder / "weights.safetensors")
    except FileNotFoundError as error:
        names = ("model.json", "weights.safetensors")
        missing = next((name for name in names if not (folder / name).exists()), names[0])
        raise InputError(
            f"{folder / missing} is missing: name a folder that holds a saved model with exits"
        ) from error
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{folder} does not hold a readable model ({error!r}): save it again"
        ) from error
    variables = named_variables(model)
    require_tensors(
        {name: variable.shape for name, variable in variables.items()},
        tensors,
        misfit=f"{folder}/weights.safetensors belongs to another model",
        fix="save the model again",
    )
    for name, variable in variables.items():
        variable[...] = jnp.asarray(tensors[name])
    return model, load_tokenizer(folder), description["about"]


def named_variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Parameters and running statistics by their path, such as `blocks.0.layers.0.mixer.q_proj.kernel`."""
    flat = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): variable for path, variable in flat}
