"""wav2vec 2.0 checkpoints of Hugging Face's transformers, read and written; nothing in a file is executed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.interop.hf_files import locate_checkpoint, read_json, read_weights
from edgespeech.interop.hf_layout import (
    HEAD,
    MASK,
    hf_names,
    read_fields,
    require_supported,
    standard_names,
    write_fields,
)
from edgespeech.interop.tensors import named_params, require_tensors, sketch, zeroed
from edgespeech.models.wav2vec2 import Padding, Wav2Vec2, Wav2Vec2Config
from edgespeech.nn.attention import SelfAttention
from edgespeech.types import SAMPLE_RATE


class HFWav2Vec2(NamedTuple):
    """What a Hugging Face checkpoint holds.

    Attributes:
        model: `Wav2Vec2` with the waveform front end, float32.
        tokenizer: of its head.
        normalise: whether upstream brings the waveform to zero mean and unit variance (`do_normalize`). Our front end
            does so always: the first convolution has no bias, so the group norm after it cancels mean and scale.
        has_head: whether the CTC head is the checkpoint's; else it is initialised at random.
        notes: what was not in the checkpoint: a head or mask embedding that is initialised at random, a vocabulary.
    """

    model: Wav2Vec2
    tokenizer: CharTokenizer
    normalise: bool
    has_head: bool
    notes: tuple[str, ...]


def load_hf_wav2vec2(path_or_id: str | Path, padding: Padding = "exact") -> HFWav2Vec2:
    """Reads a wav2vec2 checkpoint of transformers (wav2vec2-base, wav2vec2-base-960h and their kind).

    Their training-time switches other than `hidden_dropout` (attention dropout, layer drop, mask lengths) have no
    counterpart here and are not read. Outputs equal upstream's on unpadded audio.

    Args:
        path_or_id: a folder with `config.json`, `vocab.json`, `preprocessor_config.json` and `model.safetensors` or
            `pytorch_model.bin` (which needs the `torch` extra); one of these two files inside such a folder; or a hub
            id `owner/name`, read through huggingface_hub's cache.
        padding: what padded batches do: `exact` leaves an utterance's output alone, `upstream` lets it see the
            padding as PyTorch does (see `Wav2Vec2Config`).

    Raises:
        InputError: a file is missing or damaged, the configuration is not one that the model has, or tensors are
            missing, left over, of a wrong shape or not finite (all named).
    """
    folder, weights_path = locate_checkpoint(path_or_id)
    hf_config = read_json(folder / "config.json")
    processor_path = folder / "preprocessor_config.json"
    processor = read_json(processor_path) if processor_path.exists() else {}
    require_supported(folder, hf_config, processor)
    normalise = bool(processor.get("do_normalize", True))
    if padding == "upstream" and not normalise:
        # A waveform that keeps its mean jumps where the padding begins.
        raise InputError(
            f"{processor_path} has do_normalize=false, and padding='upstream' pads what has zero mean: choose 'exact'"
        )
    tensors = standard_names(read_weights(weights_path))
    has_head = any(name in tensors for name in HEAD)
    tokenizer, notes = _read_tokenizer(folder, hf_config, has_head)
    optional = (MASK,) if has_head else (*HEAD, MASK)
    absent = [name for name in optional if name not in tensors]
    try:
        fields = {**read_fields(hf_config), "vocab_size": tokenizer.vocab_size}
        config = Wav2Vec2Config(**fields, padding=padding)

        def make() -> Wav2Vec2:
            return Wav2Vec2(config, rngs=nnx.Rngs(0))

        model = sketch(make, folder / "config.json", fields, tensors)
        model = make() if absent else zeroed(model)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"{folder / 'config.json'} does not describe a model: {error}") from error

    params = {hf_names(len(model.layers))[n]: p for n, p in named_params(model).items()}
    require_tensors(
        {n: p.shape[::-1] for n, p in params.items() if n not in absent},
        tensors,
        misfit=f"{weights_path} does not fit config.json",
        fix="download the checkpoint again, or choose one of wav2vec2-base's kind",
    )
    for name in params.keys() - set(absent):
        params[name][...] = jnp.asarray(tensors[name].T)
    if absent:
        notes.append(f"not in the checkpoint, initialised at random: {', '.join(absent)}")
    return HFWav2Vec2(model, tokenizer, normalise, has_head, tuple(notes))


def save_hf_wav2vec2(folder: str | Path, model: Wav2Vec2, tokenizer: CharTokenizer) -> None:
    """Writes a folder that `transformers.Wav2Vec2ForCTC.from_pretrained` and `Wav2Vec2Processor` read.

    Args:
        folder: made when missing; `config.json` is written last, so that a half-written folder does not load.
        model: with the waveform front end and attention in every layer; stored as float32.
        tokenizer: of its head, blank at 0.

    Raises:
        InputError: the model has parts that upstream's class lacks, or the tokenizer is not the head's.
    """
    folder, config = Path(folder), model.config
    if config.front_end != "waveform":
        raise InputError(
            f"the front end is {config.front_end!r} and Hugging Face's Wav2Vec2 has only 'waveform': "
            "use save_pretrained"
        )
    for i, layer in enumerate(model.layers, 1):
        if type(layer.mixer) is not SelfAttention:
            raise InputError(
                f"layer {i} holds {type(layer.mixer).__name__} and Hugging Face's Wav2Vec2 has only attention: "
                "use save_pretrained"
            )
    if (tokenizer.vocab_size, tokenizer.blank_id) != (config.vocab_size, 0):
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and blank {tokenizer.blank_id}, the head needs "
            f"{config.vocab_size} and 0: pass the tokenizer that the model was trained with"
        )
    table = hf_names(len(model.layers))
    # reversed axes are a view: safetensors wants the memory in order
    tensors = {
        table[name]: np.ascontiguousarray(np.asarray(param[...], np.float32).T)
        for name, param in named_params(model).items()
    }
    ids = {token: i for i, token in enumerate(tokenizer.vocabulary)}
    hf_config = {
        **write_fields(config),
        "bos_token_id": ids.get("<s>"),
        "eos_token_id": ids.get("</s>"),
    }
    processor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": True,
        # with exact padding the attention here never sees it
        "return_attention_mask": config.padding == "exact",
    }
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer_config = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "word_delimiter_token": "|",
        "do_lower_case": False,
        # upstream adds a token that the vocabulary lacks, beyond the head
        **{role: token if token in ids else None for role, token in specials.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (
        ("vocab.json", ids),
        ("preprocessor_config.json", processor),
        ("tokenizer_config.json", tokenizer_config),
        ("config.json", hf_config),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def _read_tokenizer(
    folder: Path, config: Mapping[str, Any], has_head: bool
) -> tuple[CharTokenizer, list[str]]:
    path = folder / "vocab.json"
    if not has_head and not path.exists():
        return CharTokenizer(), ["no vocab.json: the vocabulary is our default of 29 characters"]
    vocabulary, size = read_json(path), config.get("vocab_size", 32)
    added = folder / "added_tokens.json"
    try:
        if added.exists():  # later tokens stand there, some of them beyond the head
            vocabulary |= {token: i for token, i in read_json(added).items() if i < size}
        tokenizer = CharTokenizer(vocabulary)
    except (InputError, TypeError) as error:
        raise InputError(f"{path} is not a vocabulary of characters: {error}") from error
    if tokenizer.blank_id != 0:
        raise InputError(f"{path} has <pad> at {tokenizer.blank_id}: CTC here needs the blank at 0")
    if has_head and tokenizer.vocab_size != size:
        raise InputError(
            f"{path} has {tokenizer.vocab_size} tokens and config.json vocab_size={size}: they must be equal; take "
            "both from the same checkpoint"
        )
    return tokenizer, []
