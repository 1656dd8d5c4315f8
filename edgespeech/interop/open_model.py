"""One function that opens any model from what a command line can say."""

import dataclasses
from pathlib import Path
from typing import Any

from edgespeech.errors import InputError
from edgespeech.interop.hf_files import locate_checkpoint, read_json
from edgespeech.interop.hf_moonshine import load_hf_moonshine
from edgespeech.interop.hf_wav2vec2 import load_hf_wav2vec2
from edgespeech.interop.moonshine_wheel import WHEEL, load_pretrained_wheel
from edgespeech.interop.pretrained import AnyTokenizer, Model, load_pretrained
from edgespeech.models.wav2vec2 import Padding, Wav2Vec2

WHEEL_NAME = "wheel"


def open_model(
    path_or_id: str | Path, padding: Padding | None = None
) -> tuple[Model, AnyTokenizer | None, dict[str, Any]]:
    """A model with its tokenizer (None for one that writes no text), and what is known about it.

    Args:
        path_or_id: a folder that `save_pretrained` wrote (it has a `model.json`); a checkpoint of Hugging Face's
            transformers, wav2vec2 with a CTC head or Moonshine with a `tokenizer.json`: its folder, its weights file,
            or its hub id `owner/name`; or `wheel`, the Moonshine of the extra `moonshine`.
        padding: see `Wav2Vec2Config`; None takes the model's own, which for Hugging Face is `exact`. Moonshine has
            exact padding alone.

    Raises:
        InputError: there is no model, or one that cannot be used; see `load_pretrained`, `load_hf_wav2vec2`,
            `load_hf_moonshine` and `load_pretrained_wheel`.
    """
    path = Path(path_or_id)
    if (path / "model.json").exists():
        model, tokenizer, about = load_pretrained(path)
        if padding is not None and isinstance(model, Wav2Vec2):
            model.config = dataclasses.replace(model.config, padding=padding)
    elif str(path_or_id) == WHEEL_NAME:
        model, tokenizer = load_pretrained_wheel()
        about = {"source": WHEEL, "notes": []}
    elif path.is_dir() and not (path / "config.json").exists():
        raise InputError(
            f"{path} holds neither model.json (a model that was saved here) nor config.json (one of Hugging Face): "
            "name a folder such as WORKDIR/teacher"
        )
    else:
        model, tokenizer, notes = _open_hugging_face(path_or_id, padding)
        about = {"source": str(path_or_id), "notes": notes}
    if padding == "upstream" and not isinstance(model, Wav2Vec2):
        raise InputError(
            f"padding is 'upstream' and {path_or_id} is a {type(model).__name__}, which has 'exact' alone: leave it out"
        )
    return model, tokenizer, about


def _open_hugging_face(
    path_or_id: str | Path, padding: Padding | None
) -> tuple[Model, AnyTokenizer, list[str]]:
    folder, weights = locate_checkpoint(path_or_id)
    if read_json(folder / "config.json").get("model_type") == "moonshine":
        model, tokenizer = load_hf_moonshine(weights)
        if tokenizer is None:
            raise InputError(
                f"{folder}/tokenizer.json is missing: take it from where the checkpoint came from"
            )
        return model, tokenizer, []
    model, tokenizer, _, has_head, notes = load_hf_wav2vec2(weights, padding or "exact")
    if not has_head:
        raise InputError(
            f"{path_or_id} has no CTC head (lm_head.weight, lm_head.bias): choose a fine-tuned checkpoint such as "
            "facebook/wav2vec2-base-960h"
        )
    return model, tokenizer, list(notes)
