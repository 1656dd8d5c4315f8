"""Checkpoints of the released early-exit Conformers and Splitformer (github.com/augustgw/early-exit-transformer)."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.interop.hf_files import read_weights
from edgespeech.interop.tensors import named_variables, require_tensors
from edgespeech.models.splitformer import Splitformer, SplitformerConfig

# What a checkpoint holds beside weights: the table of sinusoids, and BatchNorm's count of batches.
UNUSED_SUFFIXES = ("positional_encoder.pe", ".num_batches_tracked")


def splitformer_names(config: SplitformerConfig) -> dict[str, str]:
    """Our parameters and running statistics -> the released code's tensors, attention's projections taken apart.

    Every tensor of theirs is ours with the axes reversed: linear `[out in]`, convolution `[out in k]`; a convolution
    of one tap and a depthwise one have an axis of size 1 that ours lack.
    """
    modules = {}
    for i in range(2):
        modules[f"front_end.kernels.{i}"] = f"conv_subsample.sequential.{i}.weight"
        modules[f"front_end.biases.{i}"] = f"conv_subsample.sequential.{i}.bias"
    branches = [index for index in range(config.num_exits) if config.has_branch(index)]
    for m in range(config.num_exits):
        for i in range(config.layers_per_exit):
            theirs = f"conformer.{m}.conformer_layers.{i}"
            modules |= _layer_names(f"blocks.{m}.layers.{i}", theirs)
        if m in branches:
            theirs = f"conformer_parallel.{branches.index(m)}.conformer_layers.0"
            modules |= _layer_names(f"blocks.{m}.branch.layer", theirs)
        modules |= _affine_names(f"heads.{m}.output", "kernel", f"linears.{m}")
    return modules


def load_splitformer_checkpoint(path: str | Path, config: SplitformerConfig) -> Splitformer:
    """Reads the weights of a released model, such as SpeechTek/English-EE-conformer or MaxLSB/Splitformer.

    Outputs equal upstream's on a single unpadded utterance. In a padded batch they do not: here padding has no part
    in an utterance's output.

    Args:
        path: a state dict, `.safetensors` or PyTorch's (which needs the `torch` extra; nothing in it is executed).
        config: of the model in the file, `SplitformerConfig.ee_baseline()` or `.splitformer()` with the paper's front
            end; a file does not say how many heads its attention has.

    Raises:
        InputError: the file is missing or damaged; tensors are missing, left over, of a wrong shape or not finite
            (named); the config is of a kind that the released code lacks.
    """
    _require_released_kind(config)
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is missing: name the file with the state dict")
    tensors = _apart(read_weights(path))
    model = Splitformer(config, rngs=nnx.Rngs(0))
    names = splitformer_names(config)
    variables = named_variables(model)
    wanted = {
        theirs: _upstream_shape(ours, variables[ours].shape) for ours, theirs in names.items()
    }
    require_tensors(
        wanted,
        tensors,
        misfit=f"{path} does not fit the config",
        fix="choose the preset of this checkpoint (ee_baseline, splitformer, all_exits) and its sizes",
    )
    for ours, theirs in names.items():
        variable = variables[ours]
        variable[...] = jnp.asarray(tensors[theirs].T.reshape(variable.shape))
    return model


def _layer_names(ours: str, theirs: str) -> dict[str, str]:
    convolution = f"{theirs}.conv_module.sequential"
    names = {
        f"{ours}.conv.depthwise": f"{convolution}.2.weight",
        f"{ours}.conv.depthwise_bias": f"{convolution}.2.bias",
        f"{ours}.conv.middle_norm.running_mean": f"{convolution}.3.running_mean",
        f"{ours}.conv.middle_norm.running_variance": f"{convolution}.3.running_var",
    }
    for ffn in ("ffn1", "ffn2"):
        names |= _affine_names(f"{ours}.{ffn}.norm", "scale", f"{theirs}.{ffn}.sequential.0")
        names |= _affine_names(f"{ours}.{ffn}.expand", "kernel", f"{theirs}.{ffn}.sequential.1")
        names |= _affine_names(f"{ours}.{ffn}.contract", "kernel", f"{theirs}.{ffn}.sequential.4")
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        names |= _affine_names(
            f"{ours}.mixer.{projection}", "kernel", f"{theirs}.self_attn.{projection}"
        )
    for module, gain, upstream in (
        ("mixer_norm", "scale", "self_attn_layer_norm"),
        ("conv.norm", "scale", "conv_module.layer_norm"),
        ("conv.expand", "kernel", "conv_module.sequential.0"),
        ("conv.middle_norm", "scale", "conv_module.sequential.3"),
        ("conv.contract", "kernel", "conv_module.sequential.5"),
        ("norm", "scale", "final_layer_norm"),
    ):
        names |= _affine_names(f"{ours}.{module}", gain, f"{theirs}.{upstream}")
    return names


def _affine_names(ours: str, gain: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{gain}": f"{theirs}.weight", f"{ours}.bias": f"{theirs}.bias"}


def _apart(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that count, with `in_proj` as the projections of queries, keys and values."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(UNUSED_SUFFIXES):
            continue
        module, is_joint, kind = name.rpartition("in_proj_")
        if is_joint and len(tensor) % 3 == 0:
            for projection, rows in zip("qkv", np.split(tensor, 3), strict=True):
                out[f"{module}{projection}_proj.{kind}"] = rows
        else:
            out[name] = tensor
    return out


def _upstream_shape(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if ours.endswith("conv.depthwise"):
        k, d = shape
        return d, 1, k
    if ours.endswith(("conv.expand.kernel", "conv.contract.kernel")):
        return *shape[::-1], 1
    return shape[::-1]


def _require_released_kind(config: SplitformerConfig) -> None:
    released = SplitformerConfig()
    for name in ("conv_norm", "positions", "front_end", "downsample", "combine", "head"):
        value, only = getattr(config, name), getattr(released, name)
        if value != only:
            raise InputError(
                f"model.{name} is {value!r}: the released checkpoints have {only!r} alone; use the presets "
                "ee_baseline() or splitformer()"
            )
