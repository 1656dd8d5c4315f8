"""The mechanisms of `edgespeech.nn` as Linen modules with the same parameters.

    from edgespeech import linen as es

    y = es.LPA(d=256, num_heads=4, config=LPAConfig(), name="mixer")(x, lengths)

Every module of `edgespeech.nn` is here under its name: it takes the same arguments, without `rngs` and by
Linen's rules (`name`, inside `setup` or `nn.compact`), and its `params` have the NNX module's paths. Mechanisms
made of other modules come from a function: `to_linen(lambda rngs: ...)`. What is called is flax's own bridge,
`flax.nnx.bridge.ToLinen`; other methods than `__call__` are reached with `nnx_method="step"`.

Variables that are not parameters have collections of their own: `anneal`, the temperature of LPA's gates (left
out of `apply`, it is the start of the curriculum), and `batch_stats`. Binary gates: `es.LPA(..., inference=True)`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from flax.nnx.bridge import ToLinen

from edgespeech import nn
from edgespeech.errors import InputError
from edgespeech.types import Scalar


def to_linen(make: Callable[..., nnx.Module], *args, name: str | None = None, **kwargs) -> ToLinen:
    """A Linen module around what `make(*args, **kwargs)` returns.

    Args:
        make: an NNX class or a function that makes a module; it gets `rngs` if it takes them.
        args: hashable, as all attributes of a Linen module.
        name: of the Linen module.
        kwargs: as args.
    """
    # The class of NNX classes hides the arguments of their constructors.
    signature = inspect.signature(make.__init__ if inspect.isclass(make) else make)
    skip_rng = "rngs" not in signature.parameters
    return ToLinen(make, args=args, kwargs=kwargs, skip_rng=skip_rng, name=name)


def __getattr__(name: str) -> Callable[..., ToLinen]:
    if name not in nn.__all__:
        raise AttributeError(f"edgespeech.linen has no {name}: edgespeech.nn lists the mechanisms")
    return functools.partial(to_linen, getattr(nn, name))


def variables_of(module: nnx.Module) -> dict[str, Any]:
    """Linen variables, `{collection: {path: array}}`, of a trained NNX module, the arrays as they are."""
    flat = {
        (nnx.variable_name_from_type(type(leaf)), *path): leaf[...]
        for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState)))
    }
    return nnx.traversals.unflatten_mapping(flat)


def load_variables(module: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Writes Linen variables into an NNX module of the same structure, in place: the way back."""
    nnx.update(module, nnx.merge_state(*variables.values()))


def anneal(
    variables: Mapping[str, Any], progress: Scalar | float, hard: Scalar | float = 0.0
) -> dict[str, Any]:
    """The variables with every LPA at this progress and straight-through strength, each in [0, 1].

    They may be traced: `edgespeech.nn.lpa.anneal` for Linen.

    Raises:
        InputError: no LPA's variables are there.
    """
    if "anneal" not in variables:
        raise InputError(
            f"anneal got variables of {', '.join(variables) or 'nothing'}: pass all that `init` returned, "
            "of a model that has an LPA"
        )
    values = {"progress": progress, "hard": hard}

    def fill(path, leaf):
        return jax.numpy.full_like(leaf, values[path[-1].key])

    return {**variables, "anneal": jax.tree_util.tree_map_with_path(fill, variables["anneal"])}
