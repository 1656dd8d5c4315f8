"""Multiply-accumulate operations of a function, counted in its jaxpr without running it."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax

from edgespeech.errors import InputError


def count_macs(function: Callable, *args: Any) -> Counter[str]:
    """MACs of `function(*args)` by primitive: `dot_general` and `conv_general_dilated`.

    A dot counts `batch * m * n * contracted`. A convolution counts, for every output, the taps that meet an input:
    those on padding or between dilated inputs are left out, as in XLA's cost analysis. A scan counts its body as
    often as it runs, a cond its dearest branch. Element-wise operations and reductions count nothing.

    Args:
        function: traceable by JAX, or a module.
        args: its arguments; `jax.ShapeDtypeStruct` will do, as nothing is computed.

    Returns:
        MACs by primitive; `.total()` is their sum.

    Raises:
        InputError: a while loop holds MACs, and how often it runs is not in the program.
    """
    # A module is a container of arrays to JAX: tracing wants a function around it.
    return _count(jax.make_jaxpr(lambda *values: function(*values))(*args).jaxpr)


def equations(jaxpr) -> Iterator:
    """Every operation of a jaxpr, those of the programs inside it included, each once."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _sub_jaxprs(eqn):
            yield from equations(inner)


def _count(jaxpr) -> Counter[str]:
    macs: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            macs[name] += _dot(eqn)
        elif name == "conv_general_dilated":
            macs[name] += _conv(eqn)
        elif name == "cond":
            macs += max((_count(b.jaxpr) for b in eqn.params["branches"]), key=Counter.total)
        else:
            inner = sum(map(_count, _sub_jaxprs(eqn)), Counter[str]())
            if name == "while" and inner:
                raise InputError(
                    f"count_macs found a while loop with {inner.total()} MACs a turn and an unknown number of turns: "
                    "write it as a scan, or count its body alone"
                )
            times = eqn.params["length"] if name == "scan" else 1
            macs.update({key: times * value for key, value in inner.items()})
    return macs


def _sub_jaxprs(eqn) -> Iterator:
    """The programs inside an operation, such as the bodies of jit, scan, remat and custom gradients."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _dot(eqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _conv(eqn) -> int:
    p = eqn.params
    spec = p["dimension_numbers"]
    x, kernel = (v.aval.shape for v in eqn.invars)
    out = eqn.outvars[0].aval.shape
    pairs = 1
    for axis in range(len(x) - 2):
        pairs *= _tap_count(
            x[spec.lhs_spec[2 + axis]],
            kernel[spec.rhs_spec[2 + axis]],
            out[spec.out_spec[2 + axis]],
            p["window_strides"][axis],
            p["padding"][axis][0],
            p["lhs_dilation"][axis],
            p["rhs_dilation"][axis],
        )
    # The kernel's own input channels are those of one group.
    channels = out[spec.out_spec[1]] * kernel[spec.rhs_spec[1]]
    return out[spec.out_spec[0]] * channels * pairs


def _tap_count(size, taps, outputs, stride, pad, dilation, tap_dilation) -> int:
    """Pairs of an output and a tap that meet an input, along one axis."""
    positions = (i * stride + j * tap_dilation - pad for i in range(outputs) for j in range(taps))
    return sum(q >= 0 and q % dilation == 0 and q // dilation < size for q in positions)
