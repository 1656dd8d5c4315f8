"""The tensors of a model by name, and the message when a file holds others."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.errors import InputError

MOST_FAULTS = 8  # named in one message
# Of numbers in a configuration that size no tensor: widths of masks and the like, and sample rates (Hz).
MOST_UNSIZED, MOST_RATE = 1 << 10, 1 << 16
# Parameters that a model may have and its weights may lack: a head that starts at random.
MOST_ABSENT = 1 << 22

M = TypeVar("M", bound=nnx.Module)


def named_params(model: nnx.Module) -> dict[str, nnx.Param]:
    """The parameters of a model by their path, such as `layers.0.mixer.q_proj.kernel`."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): value for path, value in flat}


def named_variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Parameters and running statistics by their path, such as `blocks.0.layers.0.mixer.q_proj.kernel`."""
    flat = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): value for path, value in flat}


def require_sizes(path: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> None:
    """Refuses numbers of a configuration that are out of all proportion to the weights that it is for.

    A wrong digit may describe layers without end, or kernels that no memory holds.

    Args:
        path: of the configuration, for the message.
        config: plain numbers, text, lists and mappings.
        weights: by name.

    Raises:
        InputError: the message names the number.
    """
    longest = max((size for array in weights.values() for size in array.shape), default=0)
    for name, number in _numbers("", config):
        limit = max(longest, MOST_RATE if name == "sample_rate" else MOST_UNSIZED)
        if re.search("layers|blocks|exits|strides", name):  # each has tensors of its own
            limit = len(weights)
        if not abs(number) <= limit:  # NaN neither
            raise InputError(
                f"{path} has {name} {number} and its weights allow {limit} at most: save or fetch the model again"
            )


def sketch(
    make: Callable[[], M], path: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]
) -> M:
    """The model of a configuration, shapes for arrays, if its size goes with that of the weights.

    Args:
        make: the model, any values; traced, not run.
        path: of the configuration, for the message.
        config: see `require_sizes`.
        weights: by name.

    Raises:
        InputError: it does not.
    """
    require_sizes(path, config, weights)
    have = sum(array.size for array in weights.values())
    with _one_key():
        model = nnx.eval_shape(make)
    need = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    if need > have + MOST_ABSENT:
        raise InputError(
            f"{path} describes {need:,} parameters and there are weights for {have:,}: save or fetch the model again"
        )
    return model


@contextlib.contextmanager
def _one_key() -> Iterator[None]:
    """Within it every stream of random keys gives one and the same, and counts nothing: a sketch has no values.

    After each key Flax compares the sharding of the raised counter with that before, which a tracer does not have; JAX
    answers with a message for which it walks through all that was traced so far. That took most of the time to open a
    model (12 layers: 2.5 s of CPU in place of 1.0).
    """
    key, draw = jax.random.key(0), nnx.RngStream.__call__
    nnx.RngStream.__call__ = lambda self: key
    try:
        yield
    finally:
        nnx.RngStream.__call__ = draw


def zeroed(model: M) -> M:
    """A sketch with zeros for arrays: no initialiser runs, where all values come from a file."""
    graphdef, state = nnx.split(model)
    return nnx.merge(
        graphdef, jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), state)
    )


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Numbers in a tree of mappings and lists, each by the name of the mapping's entry that it is in."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(str(key), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(name, inner)
    elif isinstance(value, int | float):
        yield name, value


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
