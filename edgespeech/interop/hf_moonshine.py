"""Moonshine checkpoints of Hugging Face's transformers, read and written; nothing in a file is executed."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from edgespeech.errors import InputError
from edgespeech.interop.hf_files import locate_checkpoint, read_json, read_weights
from edgespeech.interop.moonshine_tokenizer import PieceTokenizer, read_tokenizer_json
from edgespeech.interop.tensors import named_params, require_sizes, require_tensors
from edgespeech.models.moonshine import Moonshine, MoonshineConfig
from edgespeech.nn.rotary import RotarySelfAttention

EMBEDDING = "model.decoder.embed_tokens.weight"
HEAD = "proj_out.weight"  # the same tensor: files hold it once, twice, or under either name

# config.json's name -> (MoonshineConfig's name, the value where config.json is silent).
CONFIG_FIELDS = {
    "vocab_size": ("vocab_size", 32_768),
    "hidden_size": ("width", 288),
    "intermediate_size": ("ffn_width", 1152),
    "encoder_num_hidden_layers": ("num_layers", 6),
    "decoder_num_hidden_layers": ("num_decoder_layers", 6),
    "encoder_num_attention_heads": ("num_heads", 8),
    "decoder_start_token_id": ("bos_id", 1),
    "eos_token_id": ("eos_id", 2),
}
# The only values that the model has; each is also what config.json means by silence.
FIXED_CONFIG = {
    "encoder_hidden_act": "gelu",
    "decoder_hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
}
FIXED_ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
ROTARY_FACTOR = 0.9  # where config.json is silent


class HFMoonshine(NamedTuple):
    """What a Hugging Face checkpoint holds.

    Attributes:
        model: `Moonshine`, float32.
        tokenizer: from tokens to text; None when the folder has no `tokenizer.json`.
    """

    model: Moonshine
    tokenizer: PieceTokenizer | None


def hf_names(num_layers: int, num_decoder_layers: int) -> dict[str, str]:
    """Our parameter names -> those of `MoonshineForConditionalGeneration`, for reading and writing.

    Every tensor of theirs is ours with the axes reversed (linear `[out in]`, convolution `[out in k]`) but for the
    embedding, which is `[v d]` in both.
    """
    table = {
        "embedding": EMBEDDING,
        "norm.scale": "model.encoder.layer_norm.weight",
        "decoder_norm.scale": "model.decoder.norm.weight",
        "front_end.norm.scale": "model.encoder.groupnorm.weight",
        "front_end.norm.bias": "model.encoder.groupnorm.bias",
        "front_end.biases.0": "model.encoder.conv2.bias",
        "front_end.biases.1": "model.encoder.conv3.bias",
        **{f"front_end.kernels.{i}": f"model.encoder.conv{i + 1}.weight" for i in range(3)},
    }
    attention = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}

    def layer(ours: str, theirs: str, attentions: Mapping[str, str], norms: Mapping[str, str]):
        for name, upstream in attentions.items():
            for a, b in attention.items():
                table[f"{ours}.{name}.{a}.kernel"] = f"{theirs}.{upstream}.{b}.weight"
        for name, upstream in norms.items():
            table[f"{ours}.{name}.scale"] = f"{theirs}.{upstream}.weight"
        for name, upstream in (("expand", "fc1"), ("contract", "fc2")):
            table[f"{ours}.ffn.{name}.kernel"] = f"{theirs}.mlp.{upstream}.weight"
            table[f"{ours}.ffn.{name}.bias"] = f"{theirs}.mlp.{upstream}.bias"

    for i in range(num_layers):
        layer(
            f"layers.{i}",
            f"model.encoder.layers.{i}",
            {"mixer": "self_attn"},
            {"mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
        )
    for i in range(num_decoder_layers):
        layer(
            f"decoder_layers.{i}",
            f"model.decoder.layers.{i}",
            {"attention": "self_attn", "cross_attention": "encoder_attn"},
            {
                "attention_norm": "input_layernorm",
                "cross_attention_norm": "post_attention_layernorm",
                "ffn_norm": "final_layernorm",
            },
        )
    return table


def load_hf_moonshine(path_or_id: str | Path) -> HFMoonshine:
    """Reads a Moonshine checkpoint of transformers (UsefulSensors/moonshine-base, moonshine-tiny and their kind).

    Attention dropout has no counterpart here and is not read. Outputs equal upstream's on unpadded audio; on padded
    batches ours keep padding out of the group norm and theirs do not.

    Args:
        path_or_id: a folder with `config.json`, `model.safetensors` or `pytorch_model.bin` (which needs the `torch`
            extra) and, for text, `tokenizer.json`; one of these two files inside such a folder; or a hub id
            `owner/name`, read through huggingface_hub's cache.

    Raises:
        InputError: a file is missing or damaged, the configuration is not one that the model has, or tensors are
            missing, left over, of a wrong shape or not finite (all named).
    """
    folder, weights_path = locate_checkpoint(path_or_id)
    hf_config = read_json(folder / "config.json")
    rotary_factor = _check_config(folder, hf_config)
    fields = {ours: hf_config.get(name, default) for name, (ours, default) in CONFIG_FIELDS.items()}
    tensors = read_weights(weights_path)
    require_sizes(folder / "config.json", fields, tensors)
    try:
        config = MoonshineConfig(**fields, rotary_factor=rotary_factor)
        model = without_values(config)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"{folder / 'config.json'} does not describe a model: {error}") from error
    head = tensors.pop(HEAD, None)
    if head is not None and not np.array_equal(tensors.setdefault(EMBEDDING, head), head):
        raise InputError(
            f"{weights_path}: {HEAD} differs from {EMBEDDING}, and the model has one tensor for both: choose a "
            "checkpoint with tied embeddings"
        )
    table = hf_names(config.num_layers, config.num_decoder_layers)
    params = {table[name]: param for name, param in named_params(model).items()}
    shapes = {n: p.shape if n == EMBEDDING else p.shape[::-1] for n, p in params.items()}
    require_tensors(
        shapes,
        tensors,
        misfit=f"{weights_path} does not fit config.json",
        fix="download the checkpoint again, or choose one of moonshine-base's kind",
    )
    for name, param in params.items():
        param.set_value(jnp.asarray(_theirs(name, tensors[name])))
    path = folder / "tokenizer.json"
    tokenizer = read_tokenizer_json(path, config.vocab_size) if path.exists() else None
    return HFMoonshine(model, tokenizer)


def save_hf_moonshine(folder: str | Path, model: Moonshine) -> None:
    """Writes `config.json` and `model.safetensors`, which `MoonshineForConditionalGeneration.from_pretrained` reads.

    The tokenizer is not written: copy `tokenizer.json` and its kind from the checkpoint that the model came from.

    Args:
        folder: made when missing; `config.json` is written last, so that a half-written folder does not load.
        model: with attention in every layer; stored as float32.

    Raises:
        InputError: the model has parts that upstream's class lacks.
    """
    folder, config = Path(folder), model.config
    for i, layer in enumerate(model.layers, 1):
        if type(layer.mixer) is not RotarySelfAttention:
            raise InputError(
                f"encoder layer {i} holds {type(layer.mixer).__name__} and Hugging Face's Moonshine has only attention"
            )
    table = hf_names(config.num_layers, config.num_decoder_layers)
    # reversed axes are a view: safetensors wants the memory in order
    tensors = {
        table[name]: np.ascontiguousarray(_theirs(table[name], np.asarray(p[...], np.float32)))
        for name, p in named_params(model).items()
    }
    hf_config = {
        "architectures": ["MoonshineForConditionalGeneration"],
        "model_type": "moonshine",
        **FIXED_CONFIG,
        **{name: getattr(config, ours) for name, (ours, _) in CONFIG_FIELDS.items()},
        "decoder_num_attention_heads": config.num_heads,
        "bos_token_id": config.bos_id,
        "rope_parameters": {**FIXED_ROTARY, "partial_rotary_factor": config.rotary_factor},
        # releases of transformers before 5 read these two instead
        "partial_rotary_factor": config.rotary_factor,
        "rope_theta": FIXED_ROTARY["rope_theta"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")


def without_values(config: MoonshineConfig) -> Moonshine:
    """A model whose parameters have shapes and no values, for a loader to fill in."""
    # nnx.Rngs counts what it draws in a variable of its own, and each count slows the trace that follows.
    key = jax.random.key(0)
    rngs: Any = SimpleNamespace(params=lambda: key)
    return nnx.eval_shape(lambda: Moonshine(config, rngs=rngs))


def _theirs(name: str, tensor: np.ndarray) -> np.ndarray:
    """Our layout of a tensor to theirs, or theirs to ours."""
    return tensor if name == EMBEDDING else tensor.T


def _check_config(folder: Path, config: Mapping[str, Any]) -> float:
    """The rotary factor, after a check that the model is the one that upstream's configuration describes."""
    wanted = {**FIXED_CONFIG, "model_type": "moonshine"}
    found: dict[str, Any] = {name: config.get(name, FIXED_CONFIG.get(name)) for name in wanted}
    heads = config.get("encoder_num_attention_heads", 8)
    for name in (
        "encoder_num_key_value_heads",
        "decoder_num_attention_heads",
        "decoder_num_key_value_heads",
    ):
        wanted[name] = heads
        found[name] = heads if config.get(name) is None else config[name]
    # transformers 5 writes rope_parameters, older releases the single values
    rotary = {"rope_theta": config.get("rope_theta", FIXED_ROTARY["rope_theta"])}
    rotary |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    for name, value in FIXED_ROTARY.items():
        wanted[name], found[name] = value, rotary.get(name, value)
    faults = [
        f"{name}={found[name]!r} (only {value!r})"
        for name, value in wanted.items()
        if found[name] != value
    ]
    if faults:
        raise InputError(
            f"{folder} is not a Moonshine that this version reads: {', '.join(faults)}; choose a checkpoint of the "
            "kind of UsefulSensors/moonshine-base"
        )
    return rotary.get("partial_rotary_factor", config.get("partial_rotary_factor", ROTARY_FACTOR))
