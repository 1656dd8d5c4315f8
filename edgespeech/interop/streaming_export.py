"""The step of a streaming model in one file for devices: the state goes in and comes out.

A file takes `audio [1 c]`, float32 in [-1, 1] at 16 kHz, the next chunk of a stream; `length [1]`, int32, its valid
samples, fewer than c at the stream's end alone; and the leaves of the state under `state.` and their paths, such as
`state.layers.0.mixer.past.keys`. It gives `logits [1 n v]`; `frames [1]`, the valid ones among them; and the leaves
after the chunk, in the same order, under `next.` and their paths. Core ML has underscores for the dots.

The state before the first chunk lies beside the file, as `FILE.state.npz`. It is not all zeros: the running norm of the
features starts from a prior. Leaves without an element, such as the past of attention without left context, stay out.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.data.corpus import write_atomically
from edgespeech.data.tokenizer import Tokenizer
from edgespeech.errors import InputError
from edgespeech.interop.coreml_export import coreml_name
from edgespeech.interop.exported import OUTPUTS, check_form, model_facts, store, write_manifest
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.models.edge_conformer_config import STRIDE
from edgespeech.types import SAMPLE_RATE

STATE, NEXT = "state.", "next."


class Step(NamedTuple):
    """A model's step as a function of arrays.

    Attributes:
        call: `(audio [1 c], length [1], *state) -> (logits [1 n v], frames [1], *next state)`.
        initial: the state before the first chunk, its leaves by path, in the order in which `call` has them.
    """

    call: Callable[..., tuple[Any, ...]]
    initial: dict[str, np.ndarray]


def step_function(model: EdgeConformer) -> Step:
    """The step of one stream; leaves without an element are left out of the state."""
    graphdef, parameters = nnx.split(model)
    paths, structure = jax.tree_util.tree_flatten_with_path(model.init_state(1))
    start = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in paths
    }
    initial = {name: leaf for name, leaf in start.items() if leaf.size}

    def call(audio, length, *leaves):
        given = start | dict(zip(initial, leaves, strict=True))
        state = jax.tree.unflatten(structure, given.values())
        logits, frames, state = nnx.merge(graphdef, parameters).step(audio, length, state)
        after = dict(zip(start, jax.tree.leaves(state), strict=True))
        return logits, frames, *(after[name] for name in initial)

    return Step(call, initial)


def export_streaming(
    model: EdgeConformer,
    tokenizer: Tokenizer,
    about: dict[str, Any],
    path: Path,
    *,
    form: str,
    frames: int | None = None,
    int8: bool = False,
) -> dict[str, Any]:
    """Writes a model's step, its manifest `PATH.manifest.json` and its first state; returns the manifest.

    Args:
        model: in inference, LPA with hard gates; its `set_chunks` decides what attention sees.
        tokenizer: of its vocabulary.
        about: what was saved with the model; `licence` and WER go into the manifest.
        path: of the file.
        form: one of `exported.FORMATS`.
        frames: of 40 ms in a chunk of the file, a multiple of the model's; None: `model.config.chunk`.
        int8: weights of 8 bits; see `exported.export`.

    Raises:
        InputError: frames that the model's chunks do not divide, a model that does not compute in float32, or see
            `exported.export`.
    """
    frames = model.config.chunk if frames is None else frames
    check_form(form, int8)
    if frames < 1 or frames * STRIDE % model.chunk:
        raise InputError(
            f"a step of {frames} frames for a model with chunks of {model.chunk // STRIDE}: give a multiple of it, or "
            "change it by set_chunks"
        )
    if model.config.dtype != "float32":
        raise InputError(
            f"the model computes in {model.config.dtype}: set dtype to float32 in its config (the parameters are "
            "float32 already) and let the device lower the precision"
        )
    samples = frames * STRIDE
    step = step_function(model)
    inputs = {
        "audio": jax.ShapeDtypeStruct((1, samples), jnp.float32),
        "length": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    inputs |= {
        STATE + name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in step.initial.items()
    }
    outputs = (*OUTPUTS, *(NEXT + name for name in step.initial))
    size = store(path, step.call, inputs, outputs, form, int8)
    name = coreml_name if form == "coreml" else str
    packed = io.BytesIO()
    first = {name(leaf): value for leaf, value in step.initial.items()}
    np.savez(packed, allow_pickle=False, **first)
    write_atomically(state_path(path), lambda file: file.write(packed.getvalue()))
    manifest = {
        "file": path.name,
        "bytes": size,
        "seconds": samples / SAMPLE_RATE,
        "chunk_samples": samples,
        # What logits may depend on after the first sample of their frame; the frame's own samples are in it.
        "lookahead_samples": model.receptive_field[1],
        "inputs": {
            "audio": {
                "shape": [1, samples],
                "dtype": "float32",
                "is": "mono in [-1, 1], the next chunk, zeros after the stream's end",
            },
            "length": {
                "shape": [1],
                "dtype": "int32",
                "is": "valid samples of audio, all but at the stream's end",
            },
        },
        "outputs": {
            "logits": {
                "shape": [1, frames, model.config.vocab_size],
                "dtype": "float32",
                "is": "unnormalised scores of the tokens in each frame",
            },
            "frames": {"shape": [1], "dtype": "int32", "is": "valid frames of logits"},
        },
        "state": {
            "is": "inputs after audio and length, outputs after logits and frames, both in this order",
            "input_prefix": name(STATE),
            "output_prefix": name(NEXT),
            "initial": state_path(path).name,
            "bytes": sum(leaf.nbytes for leaf in step.initial.values()),
            "leaves": {
                name(path): {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
                for path, leaf in step.initial.items()
            },
        },
        **model_facts(model, tokenizer, about, form, int8),
    }
    write_manifest(path, manifest)
    return manifest


def state_path(path: Path) -> Path:
    """Where the state before the first chunk lies."""
    return path.with_name(path.name + ".state.npz")
