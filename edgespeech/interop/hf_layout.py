"""How wav2vec 2.0 of Hugging Face's transformers maps to ours: names of tensors, fields of `config.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgespeech.errors import InputError
from edgespeech.models.wav2vec2 import Wav2Vec2Config
from edgespeech.nn.front_end import WAV2VEC2_KERNELS, WAV2VEC2_STRIDES
from edgespeech.types import SAMPLE_RATE

HEAD = ("lm_head.weight", "lm_head.bias")
MASK = "wav2vec2.masked_spec_embed"
# What pre-training leaves in a checkpoint and recognition does not use.
PRETRAINING = ("quantizer.", "project_hid.", "project_q.")

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


def standard_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
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


def require_supported(
    folder: Path, config: Mapping[str, Any], processor: Mapping[str, Any]
) -> None:
    """Checks that the model is the one that the two files describe.

    Args:
        folder: for the message.
        config: `config.json`.
        processor: `preprocessor_config.json`.

    Raises:
        InputError: it is not; all values that differ are named.
    """
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


def read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Wav2Vec2Config` that `config.json` sets."""
    fields = {ours: config.get(name, default) for name, (ours, default) in CONFIG_FIELDS.items()}
    return {**fields, "front_channels": config.get("conv_dim", [512])[0]}


def write_fields(config: Wav2Vec2Config) -> dict[str, Any]:
    """The `config.json` of `Wav2Vec2ForCTC`, less the ids of tokens."""
    return {
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
    }
