"""Rematerialisation: what a layer computes inside is computed again in the backward pass instead of kept for it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
from flax import nnx

_on: ContextVar[bool] = ContextVar("rematerialised", default=False)


@contextlib.contextmanager
def rematerialised(on: bool = True) -> Iterator[None]:
    """Programs that are traced inside keep the input of every layer for the backward pass, and nothing of its inside.

    They compute every layer twice, a third more than without, and their gradients are the same up to rounding. It is
    what a program is traced under that counts: one that was compiled before stays as it is. XLA's compiler for CPUs
    merges the two computations again where layers stand one by one; inside a scan (`run_layers`) memory falls too.

    Args:
        on: False changes nothing.
    """
    token = _on.set(on or _on.get())
    try:
        yield
    finally:
        _on.reset(token)


def rematerialisable(call: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the `__call__` of a layer: what `rematerialised` means by one.

    Its arguments are arrays or None. Of the layer's variables its call may change statistics alone.
    """

    @functools.wraps(call)
    def either(layer: nnx.Module, *args, **kwargs):
        if not _on.get():
            return call(layer, *args, **kwargs)
        graphdef, statistics, others = nnx.split(layer, nnx.BatchStat, ...)

        @jax.checkpoint
        def again(statistics, others, args, kwargs):
            inside = nnx.merge(graphdef, statistics, others)
            return call(inside, *args, **kwargs), nnx.state(inside, nnx.BatchStat)

        output, statistics = again(statistics, others, args, kwargs)
        nnx.update(layer, statistics)
        return output

    return either
