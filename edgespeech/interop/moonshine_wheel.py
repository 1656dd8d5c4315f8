"""The weights of moonshine-base that the wheel `moonshine-cpp==0.1.4` brings (MIT licence, English).

The wheel is the optional extra `moonshine`; nothing of it is copied, imported or executed here. Its two graphs store
every matrix as int8 with one scale and one zero point, and turn it back into float32 before use, `w = scale q + zero`.
So do we: same weights, same arithmetic, and the same text but for the order of floating-point sums.
"""

import hashlib
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from edgespeech.errors import InputError
from edgespeech.interop.hf_moonshine import hf_names, without_values
from edgespeech.interop.moonshine_tokenizer import PieceTokenizer, read_tokenizer_bin
from edgespeech.interop.ort_format import OrtGraph, read_ort
from edgespeech.interop.tensors import named_params
from edgespeech.models.moonshine import Moonshine, MoonshineConfig

WHEEL = "moonshine-cpp==0.1.4"
ENCODER, DECODER, TOKENIZER = "encoder_model.ort", "decoder_model_merged.ort", "tokenizer.bin"
SHA256 = {
    ENCODER: "9d1a19e044cbf89a207723d1adb667de89a5671a1e3e611b8ebe721b2c31219c",
    DECODER: "370e0c1f161d68dc1c2264c1a82024fb123380da3b73f47f05531d1e8d3308c3",
    TOKENIZER: "04670d78994d030185c3dd843c60591788fed0a56cc6750747bd326825f13ca9",
}
UNKNOWN_ID = 0  # of <unk>; tokenizer.bin spells it, and it is no text
RENAMED = {
    "encoder": {"o_proj": "dense"},
    "decoder": {"o_proj": "dense", "fc1": "up_proj", "fc2": "down_proj"},
}
# How a matrix becomes float in the graphs: Cast(q), times the scale, plus the zero point.
FOLDED = {"Cast": lambda q: q.astype(np.float32), "Mul": np.multiply, "Add": np.add}


class WheelMoonshine(NamedTuple):
    """What the wheel holds.

    Attributes:
        model: moonshine-base, float32.
        tokenizer: from tokens to text.
    """

    model: Moonshine
    tokenizer: PieceTokenizer


def load_pretrained_wheel(folder: str | Path | None = None) -> WheelMoonshine:
    """moonshine-base with the weights of the installed wheel.

    Args:
        folder: `models/base-en` of the wheel; None finds that of the installed package.

    Raises:
        InputError: the wheel is not installed, or a file is not the one of that version.
    """
    folder = _installed_folder() if folder is None else Path(folder)
    for name, digest in SHA256.items():
        _require_digest(folder / name, digest)
    config = MoonshineConfig.base()
    model = without_values(config)
    encoder, decoder = (_constants_of_nodes(read_ort(folder / n)) for n in (ENCODER, DECODER))
    table = graph_names(config.num_layers, config.num_decoder_layers)
    for name, param in named_params(model).items():
        node, place = table[name]
        graph = decoder if node.startswith("/model/decoder/") else encoder
        value = graph[node][place]
        # convolutions are [out in k] in the graph, the group norm's vectors [d 1]; matrices as ours
        value = value.T if value.ndim == 3 else value.reshape(param.shape)
        param.set_value(jnp.asarray(value))
    specials = (UNKNOWN_ID, config.bos_id, config.eos_id)
    return WheelMoonshine(
        model, read_tokenizer_bin(folder / TOKENIZER, config.vocab_size, specials)
    )


def graph_names(num_layers: int, num_decoder_layers: int) -> dict[str, tuple[str, int]]:
    """Our parameter names -> the node of the wheel's graphs that uses it, and its place among the node's constants.

    Nodes are called after the modules of the PyTorch model that was exported, which differ from those of transformers
    in `RENAMED`: `model.decoder.layers.0.mlp.fc1.bias` is added by `/model/decoder/layers.0/mlp/up_proj/Add`.
    """
    table = {}
    for ours, theirs in hf_names(num_layers, num_decoder_layers).items():
        # an index stays with the list that it indexes
        _, half, *modules, kind = re.split(r"\.(?!\d)", theirs)
        root = "/model/decoder" if half == "decoder" else ""
        path = "/".join([root, *(RENAMED[half].get(module, module) for module in modules)])
        if "conv" in path:
            table[ours] = f"{path}/Conv", 0 if kind == "weight" else 1
        elif "embed" in path:
            table[ours] = f"{path}/Gather", 0
        elif kind == "bias":
            table[ours] = f"{path}/Add", 0
        else:
            table[ours] = f"{path}/{'Mul' if 'norm' in path else 'MatMul'}", 0
    return table


def _constants_of_nodes(graph: OrtGraph) -> dict[str, list[np.ndarray]]:
    """The constant inputs of every node by its name, in order; of `If` the branch without a cache.

    That branch has all of the weights: with a cache, keys and values of the encoder's frames are not computed.
    """
    nodes = list(graph.nodes)
    for node in graph.nodes:
        if node.op_type == "If":
            nodes += node.attributes["else_branch"].nodes
    producers = {output: node for node in nodes for output in node.outputs}
    known: dict[str, np.ndarray | None] = dict(graph.initializers)

    def constant(name: str) -> np.ndarray | None:
        if name not in known:
            node = producers.get(name)
            known[name] = None
            if node is not None and node.op_type in FOLDED:
                operands = [constant(operand) for operand in node.inputs]
                if all(operand is not None for operand in operands):
                    known[name] = FOLDED[node.op_type](*operands)
        return known[name]

    return {
        node.name: [value for name in node.inputs if (value := constant(name)) is not None]
        for node in nodes
    }


def _installed_folder() -> Path:
    spec = importlib.util.find_spec("moonshine_cpp")
    if spec is None or spec.origin is None:
        raise InputError(
            f"{WHEEL} is not installed: pip install 'edgespeech[moonshine]', or name the folder models/base-en of it"
        )
    return Path(spec.origin).parent / "models" / "base-en"


def _require_digest(path: Path, wanted: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error}): install {WHEEL}, or name its folder models/base-en"
        ) from error
    if found != wanted:
        raise InputError(
            f"{path} has the SHA-256 {found} and not {wanted}: it is not the file of {WHEEL}; install that version"
        )
