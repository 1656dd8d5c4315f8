"""Opening a model that has a CTC head, whatever its family."""

from pathlib import Path
from typing import Any, TypeAlias

from edgespeech.data.tokenizer import Tokenizer
from edgespeech.errors import InputError
from edgespeech.interop.open_model import open_model
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.models.moonshine_ctc import MoonshineCTC
from edgespeech.models.splitformer import Splitformer
from edgespeech.models.wav2vec2 import Wav2Vec2
from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits

CTCModel: TypeAlias = Wav2Vec2 | MoonshineCTC | Wav2Vec2Exits | Splitformer | EdgeConformer
# Layers with a mixer, and one head after the last of them.
PlainCTC: TypeAlias = Wav2Vec2 | MoonshineCTC


def open_ctc_model(path_or_id: str | Path) -> tuple[CTCModel, Tokenizer, dict[str, Any]]:
    """A model, its tokenizer, and what is known about it; the `.logits` of a model with exits are those of the last.

    Args:
        path_or_id: as in `open_model`.

    Raises:
        InputError: there is no model, or it has no CTC head.
    """
    model, tokenizer, about = open_model(path_or_id)
    if not isinstance(model, CTCModel) or not isinstance(tokenizer, Tokenizer):
        raise InputError(
            f"{path_or_id} is a {type(model).__name__}, which has no CTC head: choose a wav2vec2, a Moonshine with a "
            "CTC head, a Splitformer or an edge Conformer"
        )
    return model, tokenizer, about
