"""The tensors of a model by name, and the message when a file holds others."""

from collections.abc import Mapping

import numpy as np
from flax import nnx

from edgespeech.errors import InputError

MOST_FAULTS = 8  # named in one message


def named_params(model: nnx.Module) -> dict[str, nnx.Param]:
    """The parameters of a model by their path, such as `layers.0.mixer.q_proj.kernel`."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): value for path, value in flat}


def named_variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Parameters and running statistics by their path, such as `blocks.0.layers.0.mixer.q_proj.kernel`."""
    flat = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): value for path, value in flat}


def copy_but_head(model: nnx.Module, source: nnx.Module, name: str) -> None:
    """Copies all parameters of `source` but those of its `head` into a model of the same sizes, in place.

    The head belongs to a tokenizer, and the new model may have another.

    Args:
        model: takes the parameters.
        source: gives them.
        name: of the source, for the message.

    Raises:
        InputError: the two differ in more than the head; the message names the tensors.
    """

    def body(module: nnx.Module) -> dict[str, nnx.Param]:
        return {n: p for n, p in named_params(module).items() if not n.startswith("head.")}

    wanted, found = body(model), body(source)
    require_tensors(
        {n: param.shape for n, param in wanted.items()},
        {n: np.asarray(param[...]) for n, param in found.items()},
        misfit=f"{name} has an encoder of other sizes",
        fix="choose its preset and its --model.* flags",
    )
    for n, param in wanted.items():
        param[...] = found[n][...]


def require_tensors(
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, np.ndarray],
    *,
    misfit: str,
    fix: str,
) -> None:
    """Checks that a file holds the tensors of a model, each of its shape and finite, and no others.

    Args:
        wanted: shapes by name.
        found: what the file holds.
        misfit: how the message begins: which file does not fit what.
        fix: how it ends.

    Raises:
        InputError: it does not; the message names the tensors, at most eight of them.
    """
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
        more = len(faults) - MOST_FAULTS
        named = "; ".join(sorted(faults)[:MOST_FAULTS])
        raise InputError(f"{misfit}: {named}{f' and {more} more' if more > 0 else ''}; {fix}")
