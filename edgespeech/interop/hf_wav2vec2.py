"""wav2vec 2.0 checkpoints of Hugging Face's transformers, read and written; nothing in a file is executed."""

import importlib
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.front_end import WAV2VEC2_KERNELS, WAV2VEC2_STRIDES
from edgespeech.types import SAMPLE_RATE

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
HEAD = ("lm_head.weight", "lm_head.bias")
MASK = "wav2vec2.masked_spec_embed"
# What pre-training leaves in a checkpoint and recognition does not use.
PRETRAINING = ("quantizer.", "project_hid.", "project_q.")
# What safetensors and torch.load(weights_only=True) raise for a file that is damaged or holds more than tensors.
UNREADABLE = (
    *(OSError, ValueError, TypeError, AttributeError, RuntimeError, EOFError),
    *(pickle.UnpicklingError, SafetensorError),
)

# config.json's name -> (Wav2Vec2Config's name, the value where config.json is silent).
CONFIG_FIELDS = {
    "vocab_size": ("vocab_size", 32),
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("num_layers", 12),
    "num_attention_heads": ("num_heads", 12),
    "intermediate_size": ("ffn_width", 3072),
    "do_stable_layer_norm": ("norm_first", False),
    "num_conv_pos_embeddings": ("position_kernel", 128),
    "num_conv_pos_embedding_groups": ("position_groups", 16),
    "hidden_dropout": ("dropout", 0.1),
}
# The only values that the model has; each is also what config.json means by silence.
FIXED_CONFIG = {
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "hidden_act": "gelu",
    "conv_bias": False,
    "conv_kernel": list(WAV2VEC2_KERNELS),
    "conv_stride": list(WAV2VEC2_STRIDES),
    "layer_norm_eps": 1e-5,
    "pad_token_id": 0,
    "add_adapter": False,
    "adapter_attn_dim": None,
}


class HFWav2Vec2(NamedTuple):
    """What a Hugging Face checkpoint holds.

    Attributes:
        model: `Wav2Vec2` with the waveform front end, float32.
        tokenizer: of its head.
        normalise: whether upstream brings the waveform to zero mean and unit variance (`do_normalize`). Our front end
            does so always: the first convolution has no bias, so the group norm after it cancels mean and scale.
        notes: what was not in the checkpoint: a head or mask embedding that is initialised at random, a vocabulary.
    """

    model: Wav2Vec2
    tokenizer: CharTokenizer
    normalise: bool
    notes: tuple[str, ...]


def hf_names(num_layers: int) -> dict[str, str]:
    """Our parameter names -> those of `Wav2Vec2ForCTC`, for reading and writing.

    Every tensor of theirs is ours with the axes reversed: linear `[out in]`, convolution `[out in k]`, gain `[1 1 k]`.
    """
    modules = {
        "projection_norm": "wav2vec2.feature_projection.layer_norm",
        "projection": "wav2vec2.feature_projection.projection",
        "norm": "wav2vec2.encoder.layer_norm",
        "head": "lm_head",
    }
    for i in range(num_layers):
        ours, theirs = f"layers.{i}", f"wav2vec2.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            modules[f"{ours}.mixer.{name}"] = f"{theirs}.attention.{name}"
        modules[f"{ours}.mixer_norm"] = f"{theirs}.layer_norm"
        modules[f"{ours}.ffn.expand"] = f"{theirs}.feed_forward.intermediate_dense"
        modules[f"{ours}.ffn.contract"] = f"{theirs}.feed_forward.output_dense"
        modules[f"{ours}.ffn_norm"] = f"{theirs}.final_layer_norm"
    table = {}
    for ours, theirs in modules.items():
        table[f"{ours}.{'scale' if ours.endswith('norm') else 'kernel'}"] = f"{theirs}.weight"
        table[f"{ours}.bias"] = f"{theirs}.bias"
    convolutions = "wav2vec2.feature_extractor.conv_layers"
    for i in range(len(WAV2VEC2_KERNELS)):
        table[f"front_end.kernels.{i}"] = f"{convolutions}.{i}.conv.weight"
    table["front_end.norm_scale"] = f"{convolutions}.0.layer_norm.weight"
    table["front_end.norm_bias"] = f"{convolutions}.0.layer_norm.bias"
    positions = "wav2vec2.encoder.pos_conv_embed.conv"
    table["positions.gain"] = f"{positions}.weight_g"
    table["positions.direction"] = f"{positions}.weight_v"
    table["positions.bias"] = f"{positions}.bias"
    table["mask_embedding"] = MASK
    return table


def load_hf_wav2vec2(path_or_id: str | Path) -> HFWav2Vec2:
    """Reads a wav2vec2 checkpoint of transformers (wav2vec2-base, wav2vec2-base-960h and their kind).

    Their training-time switches other than `hidden_dropout` (attention dropout, layer drop, mask lengths) have no
    counterpart here and are not read. Outputs equal upstream's on unpadded audio; on padded batches ours keep
    padding out of the group norm and theirs do not.

    Args:
        path_or_id: a folder with `config.json`, `vocab.json`, `preprocessor_config.json` and `model.safetensors` or
            `pytorch_model.bin` (which needs the `torch` extra); one of these two files inside such a folder; or a hub
            id `owner/name`, read through huggingface_hub's cache.

    Raises:
        InputError: a file is missing or damaged, the configuration is not one that the model has, or tensors are
            missing, left over, of a wrong shape or not finite (all named).
    """
    folder, weights_path = _locate(path_or_id)
    hf_config = _read_json(folder / "config.json")
    normalise = _check_config(folder, hf_config)
    tensors = _standard_names(_read_weights(weights_path))
    headless = not any(name in tensors for name in HEAD)
    tokenizer, notes = _read_tokenizer(folder, hf_config, headless)
    try:
        fields = {
            ours: hf_config.get(name, default) for name, (ours, default) in CONFIG_FIELDS.items()
        }
        fields["vocab_size"] = tokenizer.vocab_size
        channels = hf_config.get("conv_dim", [512])[0]
        model = Wav2Vec2(Wav2Vec2Config(**fields, front_channels=channels), rngs=nnx.Rngs(0))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"{folder / 'config.json'} does not describe a model: {error}") from error

    params = {hf_names(len(model.layers))[n]: p for n, p in _named_params(model).items()}
    optional = (*HEAD, MASK) if headless else (MASK,)
    absent = [name for name in optional if name not in tensors]
    _require_tensors(
        weights_path, {n: p.shape[::-1] for n, p in params.items() if n not in absent}, tensors
    )
    for name in params.keys() - set(absent):
        params[name][...] = jnp.asarray(tensors[name].T)
    if absent:
        notes.append(f"not in the checkpoint, initialised at random: {', '.join(absent)}")
    return HFWav2Vec2(model, tokenizer, normalise, tuple(notes))


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
        for name, param in _named_params(model).items()
    }
    ids = {token: i for i, token in enumerate(tokenizer.vocabulary)}
    hf_config = {
        "architectures": ["Wav2Vec2ForCTC"],
        "model_type": "wav2vec2",
        **FIXED_CONFIG,
        **{name: getattr(config, ours) for name, (ours, _) in CONFIG_FIELDS.items()},
        "conv_dim": [config.front_channels] * len(WAV2VEC2_KERNELS),
        # our one rate is applied where upstream has hidden_dropout and activation_dropout, and nowhere else
        "activation_dropout": config.dropout,
        **dict.fromkeys(
            ("attention_dropout", "feat_proj_dropout", "final_dropout", "layerdrop"), 0.0
        ),
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
        # the attention here never sees padding
        "return_attention_mask": True,
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


def _named_params(model: nnx.Module) -> dict[str, nnx.Param]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): value for path, value in flat}


def _locate(path_or_id: str | Path) -> tuple[Path, Path]:
    """The folder and the file with the weights."""
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} where an object must be")
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: download the whole checkpoint folder") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): download it again") from error
    return content


def _check_config(folder: Path, config: Mapping[str, Any]) -> bool:
    """`do_normalize`, after a check that the model is the one that upstream's configuration describes."""
    path = folder / "preprocessor_config.json"
    processor = _read_json(path) if path.exists() else {}
    wanted = {**FIXED_CONFIG, "model_type": "wav2vec2", "sampling_rate": SAMPLE_RATE}
    given = {"model_type": None, "sampling_rate": SAMPLE_RATE, **processor, **config}
    found = {name: given.get(name, value) for name, value in wanted.items()}
    faults = [
        f"{name}={found[name]!r} (only {value!r})"
        for name, value in wanted.items()
        if found[name] != value
    ]
    channels = config.get("conv_dim", [512])
    if not isinstance(channels, list) or len(set(channels)) != 1:
        faults.append(f"conv_dim={channels!r} (only equal widths)")
    if faults:
        raise InputError(
            f"{folder} is not a wav2vec2 that this version reads: {', '.join(faults)}; choose a checkpoint of the "
            "kind of facebook/wav2vec2-base-960h"
        )
    return bool(processor.get("do_normalize", True))


def _read_tokenizer(
    folder: Path, config: Mapping[str, Any], headless: bool
) -> tuple[CharTokenizer, list[str]]:
    path = folder / "vocab.json"
    if headless and not path.exists():
        return CharTokenizer(), ["no vocab.json: the vocabulary is our default of 29 characters"]
    vocabulary, size = _read_json(path), config.get("vocab_size", 32)
    added = folder / "added_tokens.json"
    try:
        if added.exists():  # later tokens stand there, some of them beyond the head
            vocabulary |= {token: i for token, i in _read_json(added).items() if i < size}
        tokenizer = CharTokenizer(vocabulary)
    except (InputError, TypeError) as error:
        raise InputError(f"{path} is not a vocabulary of characters: {error}") from error
    if tokenizer.blank_id != 0:
        raise InputError(f"{path} has <pad> at {tokenizer.blank_id}: CTC here needs the blank at 0")
    if not headless and tokenizer.vocab_size != size:
        raise InputError(
            f"{path} has {tokenizer.vocab_size} tokens and config.json vocab_size={size}: they must be equal; take "
            "both from the same checkpoint"
        )
    return tokenizer, []


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    """All floating tensors of a file, as float32."""
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
    except UNREADABLE as error:
        raise InputError(
            f"{path} is not a file of tensors alone ({type(error).__name__}): download it again, or take the "
            "safetensors version"
        ) from error


def _standard_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by the names of `hf_names`: one form of the weight norm, with the prefix, without pre-training's."""
    bare = not any(name.startswith("wav2vec2.") for name in tensors)  # of Wav2Vec2Model
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(PRETRAINING):
            continue
        name = name.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        renamed[f"wav2vec2.{name}" if bare else name] = tensor
    return renamed


def _require_tensors(
    path: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, np.ndarray]
) -> None:
    faults = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    faults += [f"{name} is not part of the model" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        if found[name].shape != wanted[name]:
            faults.append(
                f"{name} has shape {list(found[name].shape)} instead of {list(wanted[name])}"
            )
        elif not np.isfinite(found[name]).all():
            faults.append(f"{name} holds values that are not finite")
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise InputError(
            f"{path} does not fit config.json: {'; '.join(sorted(faults)[:8])}{more}; download the checkpoint again, "
            "or choose one of wav2vec2-base's kind"
        )
