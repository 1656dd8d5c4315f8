"""Proofs about a low-precision program: the floats it holds, and what it gives if every operation rounds at once."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from edgespeech.evaluation.macs import equations


def traced_floats(function: Callable, *args) -> set[str]:
    """Names of all floating dtypes in the jaxpr of a function."""
    variables = (
        v for e in equations(jax.make_jaxpr(function)(*args).jaxpr) for v in (*e.invars, *e.outvars)
    )
    dtypes = {v.aval.dtype for v in variables if hasattr(v.aval, "dtype")}
    return {d.name for d in dtypes if jnp.issubdtype(d, jnp.floating)}


def compiled_floats(function: Callable, *args) -> set[str]:
    """Floating types, in XLA's names, in the compiled program; dots and convolutions may accumulate wider."""
    text = jax.jit(function).lower(*args).compile().as_text() or ""
    lines = (line for line in text.splitlines() if not re.search(r" (dot|convolution)\(", line))
    return {t for line in lines for t in re.findall(r"\b(b?f\d+\w*)\[", line)}


_ARITHMETIC: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "floor": np.floor,
    "sqrt": np.sqrt,
    "exp": np.exp,
    "log": np.log,
    "square": np.square,
}


def oracle(function: Callable, *args) -> list[np.ndarray]:
    """The outputs of a function with every operation in float64, each rounded to its own dtype at once.

    It interprets the jaxpr, so no compiler can fuse, reorder or widen anything. What only moves data or compares is
    left to JAX, one operation at a time.
    """
    closed = jax.make_jaxpr(function)(*args)
    with np.errstate(all="ignore"):
        return _interpret(closed.jaxpr, closed.consts, [np.asarray(a) for a in args])


def _interpret(jaxpr, consts, args):
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inputs = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
        dtype = getattr(eqn.outvars[0].aval, "dtype", None)
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if inner is not None:
            outputs = _interpret(inner.jaxpr, inner.consts, inputs)
        elif name == "integer_pow":
            base = result = np.asarray(inputs[0])
            for _ in range(eqn.params["y"] - 1):
                result = _rounded(np.multiply, [result, base], dtype)
            outputs = [np.ones_like(base) if eqn.params["y"] == 0 else result]
        elif name in _ARITHMETIC and dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            outputs = [_rounded(_ARITHMETIC[name], inputs, dtype)]
        else:
            outputs = eqn.primitive.bind(*map(jnp.asarray, inputs), **eqn.params)
            outputs = [
                np.asarray(o) for o in (outputs if eqn.primitive.multiple_results else [outputs])
            ]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]


def _rounded(function, inputs, dtype):
    return np.asarray(function(*(np.asarray(i, np.float64) for i in inputs))).astype(dtype)
