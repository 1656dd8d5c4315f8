"""SepFormer checkpoints of SpeechBrain, read; nothing in a file is executed.

What differs from SpeechBrain's model with the same weights:

- It leaves the samples behind its last whole frame silent; here zeros complete a last frame. Outputs are equal where
  `(t - kernel_size)` is a multiple of the stride; on other lengths ours equal its on the completed audio.
- Its padded batches let the padding into norms and attention; here an utterance gives what it gives alone.
- Its table of positions ends at 2500 chunks (312 s at 8 kHz); here there is no end.
- Estimates are `[b spk t]`, not `[b t spk]`, and nothing scales them to their peak, as its `separate_file` does.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.interop.hf_files import read_weights
from edgespeech.interop.tensors import named_params, require_tensors
from edgespeech.models.sepformer import SepFormer, SepFormerConfig

FILES = ("encoder", "masknet", "decoder")  # each with the suffix .ckpt
# Tables that a checkpoint stores and that `sinusoidal_positions` computes.
POSITIONS = ".pos_enc.pe"
FUSED = "att.in_proj_"


def speechbrain_names(config: SepFormerConfig) -> dict[str, str]:
    """Our parameter names -> SpeechBrain's, the file's name in front; query, key and value by names of their own.

    Every tensor of theirs is ours with the axes reversed, once the kernel axes of 1x1 convolutions are dropped.
    """
    mask = "mask_network"
    modules = {
        f"{mask}.norm": "masknet.norm",
        f"{mask}.bottleneck": "masknet.conv1d",
        f"{mask}.speakers": "masknet.conv2d",
        f"{mask}.output": "masknet.output.0",
        f"{mask}.gate": "masknet.output_gate.0",
        f"{mask}.expand": "masknet.end_conv1x1",
    }
    layer_modules = {
        "mixer.q_proj": "self_att.att.q_proj",
        "mixer.k_proj": "self_att.att.k_proj",
        "mixer.v_proj": "self_att.att.v_proj",
        "mixer.out_proj": "self_att.att.out_proj",
        "mixer_norm": "norm1.norm",
        "ffn.expand": "pos_ffn.ffn.0",
        "ffn.contract": "pos_ffn.ffn.3",
        "ffn_norm": "norm2.norm",
    }
    depths = {"intra": config.num_intra_layers, "inter": config.num_inter_layers}
    for block in range(config.num_blocks):
        ours, theirs = f"{mask}.blocks.{block}", f"masknet.dual_mdl.{block}"
        for path, depth in depths.items():
            modules[f"{ours}.{path}_norm"] = f"{theirs}.{path}_norm"
            modules[f"{ours}.{path}.norm"] = f"{theirs}.{path}_mdl.mdl.norm.norm"
            for layer in range(depth):
                for name, other in layer_modules.items():
                    modules[f"{ours}.{path}.layers.{layer}.{name}"] = (
                        f"{theirs}.{path}_mdl.mdl.layers.{layer}.{other}"
                    )
    table = {
        "encoder": "encoder.conv1d.weight",
        "decoder": "decoder.weight",
        f"{mask}.slope": "masknet.prelu.weight",
    }
    for ours, theirs in modules.items():
        table[f"{ours}.{'scale' if ours.endswith('norm') else 'kernel'}"] = f"{theirs}.weight"
        if not ours.endswith(("bottleneck", "expand")) or ".ffn." in ours:
            table[f"{ours}.bias"] = f"{theirs}.bias"
    return table


def load_speechbrain_sepformer(
    folder: str | Path, config: SepFormerConfig | None = None
) -> SepFormer:
    """Reads a folder of SpeechBrain's, such as speechbrain/sepformer-wham-enhancement.

    Args:
        folder: with `encoder.ckpt`, `masknet.ckpt` and `decoder.ckpt`. Its `hyperparams.yaml` can run code and is not
            read.
        config: what `hyperparams.yaml` says; None: `SepFormerConfig.wham()`. Tensors tell their sizes, but not the
            sample rate, the heads and the length of the chunks.

    Returns:
        The model in float32.

    Raises:
        InputError: a file is missing or damaged, PyTorch is not installed, or tensors are missing, left over, not
            finite or of another shape than the configuration's (all named).
    """
    folder, config = Path(folder), config or SepFormerConfig.wham()
    tensors: dict[str, np.ndarray] = {}
    for name in FILES:
        path = folder / f"{name}.ckpt"
        if not path.is_file():
            raise InputError(
                f"{path} is missing: name a folder with {', '.join(f'{n}.ckpt' for n in FILES)}"
            )
        tensors |= _standard({f"{name}.{key}": value for key, value in read_weights(path).items()})
    model = SepFormer(config, rngs=nnx.Rngs(0))
    table = speechbrain_names(config)
    params = {table[name]: param for name, param in named_params(model).items()}
    require_tensors(
        {name: param.shape[::-1] for name, param in params.items()},
        tensors,
        misfit=f"{folder} is not the SepFormer of the configuration",
        fix="give the sizes in the folder's hyperparams.yaml as SepFormerConfig, or download the folder again",
    )
    for name, param in params.items():
        param[...] = jnp.asarray(tensors[name].T)
    return model


def _standard(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without tables of positions, 1x1 convolutions as matrices, and the fused projection in its three parts."""
    parts = {}
    for name, tensor in tensors.items():
        if name.endswith(POSITIONS):
            continue
        while name.startswith("masknet.") and tensor.ndim > 2 and tensor.shape[-1] == 1:
            tensor = tensor[..., 0]
        if FUSED in name and len(tensor) % 3 == 0:
            for part, value in zip("qkv", np.split(tensor, 3), strict=True):
                parts[name.replace(FUSED, f"att.{part}_proj.")] = value
        else:
            parts[name] = tensor
    return parts
