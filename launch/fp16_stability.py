"""Checks that the low-precision operators stay in range, and accurate, on the devices of this machine.

Command     python -m launch.fp16_stability [--dtype=float16] [--paths=eager,jit,jit_noalgsimp] [--sizes=144,...,2048]
Hardware    whatever JAX finds: every local device and the CPU; on many hosts, start it on each
Time        two minutes of one CPU core, most of it compilation
Expect      a table for every device and path, with no overflow, no NaN and every relative error at most 4e-3 in
            float16 (in other formats in proportion to their rounding unit). Status 1 if anything fails

The rows are the worst a layer norm or a softmax can meet. A check that cannot fail proves nothing, so naive float16
code runs beside (the canaries) and has to fail; no float32 may hide in the traced or compiled program; and the result
is compared with that of an oracle that rounds after every single operation. The path jit_noalgsimp switches off XLA's
algebraic simplifier, which rewrites quotients and may create or hide an overflow; it runs in a process of its own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax
from jax.extend.core import Literal

from edgespeech.errors import InputError
from edgespeech.evaluation.macs import equations
from edgespeech.ops import norm, softmax
from edgespeech.ops.norm import PreNormalizer
from experiments import program

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)

DTYPES = ("float16", "bfloat16", "float8_e5m2", "float8_e4m3fn")
PATHS = ("eager", "jit", "jit_noalgsimp")
SIZES = (144, 256, 511, 512, 1024, 2048)
NO_ALGSIMP = "--xla_disable_hlo_passes=algsimp"
FLOAT16_LIMIT = 4e-3
flags.DEFINE_enum("dtype", "float16", DTYPES, "Format of the activations.")
flags.DEFINE_list("paths", list(PATHS), "How programs run: " + ", ".join(PATHS) + ".")
flags.DEFINE_list("sizes", [str(n) for n in SIZES], "Elements of a row.")


# ------------------------------------------------------------------------------- what is checked


class Operator(NamedTuple):
    """An operator and its float64 reference.

    Attributes:
        call: `[r n] -> [r n]`.
        reference: value in float64.
        gradient: of `sum(g value)` in float64, from x and g; NaN in rows where it does not exist.
        cancels: the size `[r]` of what is subtracted in the gradient, from value and g: errors are measured in it.
    """

    call: Callable
    reference: Callable
    gradient: Callable
    cancels: Callable = lambda y, g: np.zeros(len(y))


def operators(dtype) -> dict[str, Operator]:
    """Every operator of the suite by name."""
    floor = norm.smallest_root_eps(dtype) ** 2

    def lp(p, eps, pre):
        held = max(eps, floor)

        def gradient(x, g):
            dx = norm.lp_normalize_gradient_reference(x, g, p, held)
            if p == 1:  # |d| has no derivative at 0: any sign would be right there
                d = np.abs(x - x.mean(-1, keepdims=True))
                dx[(d <= 1e-6 * d.max(-1, keepdims=True)).any(-1)] = np.nan
            return dx

        return Operator(
            lambda x: norm.lp_normalize(x, p, eps, pre),
            lambda x: norm.lp_normalize_reference(x, p, held),
            gradient,
        )

    def soft(table):
        def gradient(x, g):
            y = softmax.softmax_reference(x)
            return y * (g - (g * y).sum(-1, keepdims=True))

        return Operator(
            lambda x: softmax.softmax(x, table=table),
            softmax.softmax_reference,
            gradient,
            lambda y, g: y.max(-1) * np.abs(g).max(-1),  # of y g - y sum(g y)
        )

    return {
        "L2 MAD": lp(2, 1e-5, PreNormalizer.MAD),
        "L2 MAD eps 0": lp(2, 0.0, PreNormalizer.MAD),
        "L2 max-abs": lp(2, 1e-5, PreNormalizer.MAX_ABS),
        "L1 MAD": lp(1, 1e-5, PreNormalizer.MAD),
        "L3 max-abs": lp(3, 1e-5, PreNormalizer.MAX_ABS),
        "softmax": soft(None),
        "softmax table": soft(softmax.exp_table(dtype=dtype)),
    }


def families(n: int, dtype, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows `[3 n]` of every kind; the values in the names are those of float16, other formats scale them."""
    rng = np.random.default_rng(seed)
    top = float(jnp.finfo(dtype).max)
    unit, middle = top / 65504, np.sqrt(top) / np.sqrt(65504)

    def noise():
        return rng.normal(size=(3, n))

    zeros, place = np.zeros((3, n)), (np.arange(3), [0, n // 2, n - 1])
    one_hot, pair, bump, outlier = zeros.copy(), zeros.copy(), zeros + 2e4 * unit, noise()
    one_hot[place], outlier[place] = 6e4 * unit, 3e4 * unit
    pair[:, n // 3], pair[:, n // 2] = 6e4 * unit, -6e4 * unit
    bump[place] *= 1.01
    rows = {
        "one-hot 6e4": one_hot,
        "+-6e4 pair": pair,
        "+-65504": np.where(noise() > 0, top, -top),
        "2e4 + 50 N": unit * (2e4 + 50 * noise()),
        "1e-5 N": 1e-5 * noise(),
        "zeros": zeros,
        "constant 2e4": zeros + 2e4 * unit,
        "one step off 2e4": bump,
        "300 N": 300 * middle * noise(),
        "1000 + N": min(1000.0, top / 64) + noise(),
        "outlier 3e4": outlier,
        "N": noise(),
    }
    return {name: np.asarray(jnp.asarray(x, dtype)) for name, x in rows.items()}


def gradients(n: int, dtype, seed: int = 1) -> np.ndarray:
    """Cotangents `[3 n]`: of unit size, as large as the format allows (loss scaling), and small."""
    g = np.random.default_rng(seed).uniform(-1, 1, size=(3, n))
    return np.asarray(jnp.asarray(g * [[1.0], [float(jnp.finfo(dtype).max)], [1e-3]], dtype))


def value_and_gradient(call: Callable) -> Callable:
    """`(x, g) -> (y, dx)`."""

    def both(x, g):
        y, vjp = jax.vjp(call, x)
        return y, vjp(g)[0]

    return both


# ------------------------------------------------------------------------- proofs about a program


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


# ---------------------------------------------------------------------------------------- running


def canaries(run: Callable, dtype, n: int = 512) -> list[str]:
    """Naive code that has to fail; returns what did not, in words."""
    middle = 1.17 * float(np.sqrt(float(jnp.finfo(dtype).max)))
    x = np.asarray(jnp.asarray(middle * np.random.default_rng(0).normal(size=(3, n)), dtype))
    survivors = []
    y = run(lambda v: v * v / v)(jnp.full(8, middle, dtype))
    if np.isfinite(np.float64(y)).all():
        survivors.append(f"{middle:g}^2 / {middle:g} is finite")

    def naive(x):
        d = x - lax.reduce_sum(x, (1,))[:, None] / n
        return d / lax.sqrt(lax.reduce_sum(d * d, (1,))[:, None] / n + 1e-5)

    error = relative_error(run(naive)(x), norm.lp_normalize_reference(x))
    if error <= limit(dtype):
        survivors.append(f"a naive layer norm has error {error:.1e}")
    return survivors


def limit(dtype) -> float:
    """Largest relative error that passes: 4e-3 in float16, about eight rounding units in any format, 0.8 at most."""
    units = float(jnp.finfo(dtype).eps) / float(jnp.finfo(jnp.float16).eps)
    return min(FLOAT16_LIMIT * units, 0.8)


def relative_error(got, want, scale=0.0) -> float:
    """Largest difference in a row over the row's largest value, or over `scale` if that is larger; inf if not finite.

    Values near the format's smallest number have fewer digits: its distance from 0 counts as one rounding error.
    The format's largest number stands for everything beyond it as well. A row of NaN in `want` is not compared.
    """
    top = float(jnp.finfo(got.dtype).max)
    floor = norm.smallest(got.dtype) / float(jnp.finfo(got.dtype).eps)
    got, want = np.float64(got), np.float64(want)
    if not np.isfinite(got).all():
        return np.inf
    is_saturated = np.abs(got) >= top
    difference = np.where(
        is_saturated, np.maximum(0.0, top - np.sign(got) * want), np.abs(got - want)
    )
    size = np.maximum(np.maximum(np.abs(want).max(-1), scale), floor)
    return float(np.max(np.nan_to_num(difference.max(-1) / size)))


class Result(NamedTuple):
    """Largest relative errors of an operator on a family: of value and gradient, and of both against the oracle."""

    value: float = 0.0
    gradient: float = 0.0
    oracle: float = 0.0


def check(operator: Operator, run: Callable, n: int, dtype) -> dict[str, Result]:
    """Runs an operator on every family of n elements; `run` is the identity (eager) or `jax.jit`."""
    both = value_and_gradient(operator.call)
    function, g = run(both), gradients(n, dtype)
    results = {}
    for family, x in families(n, dtype).items():
        y, dx = function(jnp.asarray(x), jnp.asarray(g))
        want = operator.reference(x)
        want_dx = operator.gradient(np.float64(x), np.float64(g))
        scale = operator.cancels(want, np.float64(g))
        y_oracle, dx_oracle = oracle(both, x, g)
        results[family] = Result(
            relative_error(y, want),
            relative_error(dx, want_dx, scale),
            max(
                relative_error(y, y_oracle),
                relative_error(dx, dx_oracle, np.fmax(scale, np.abs(want_dx).max(-1))),
            ),
        )
    return results


def check_device(run: Callable, sizes: list[int], dtype, *, is_compiled: bool) -> list[str]:
    """All operators and proofs on the default device: prints the table, returns what failed, in words."""
    failures = [f"canary alive: {survivor}" for survivor in canaries(run, dtype)]
    table: dict[str, list[str]] = {}
    for name, operator in operators(dtype).items():
        worst: dict[str, Result] = {}
        accepted = 0
        for n in sizes:
            try:
                results = check(operator, run, n, dtype)
            except InputError as refusal:
                print(f"refused: {refusal}")
                continue
            accepted = n
            for family, result in results.items():
                worst[family] = Result(*map(max, result, worst.get(family, Result())))
                failures += [
                    f"{name}, {family}, n = {n}: {what} error {value:.1e}"
                    for what, value in result._asdict().items()
                    if not value <= limit(dtype)
                ]
        for family, result in worst.items():
            cell = " ".join(f"{100 * value:6.3f}" for value in result)
            table.setdefault(family, []).append(cell)
        if not worst:
            table = {family: [*table.get(family, []), "refused"] for family in families(3, dtype)}
            continue
        both, x = value_and_gradient(operator.call), families(accepted, dtype)["N"]
        floats = traced_floats(both, x, x)
        if floats != {dtype.name}:
            failures.append(f"{name}: the traced program holds {sorted(floats)}")
        # Where a backend has no arithmetic in a format it widens it, openly; float16 it has to keep.
        compiled = compiled_floats(both, x, x) if is_compiled and dtype == jnp.float16 else {"f16"}
        if compiled != {"f16"}:
            failures.append(f"{name}: the compiled program holds {sorted(compiled)}")
    print(f"{'error, %':18}" + "".join(f"{name:^23}" for name in operators(dtype)))
    print(f"{'':18}" + "  value   grad oracle  " * len(operators(dtype)))
    for family, cells in table.items():
        print(f"{family:18}" + " ".join(f"{cell:>22}" for cell in cells))
    return failures


def check_path(path: str, sizes: list[int], dtype) -> int:
    """One path on every device of this process; returns the number of failures."""
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        devices += jax.local_devices(backend="cpu")
    count = 0
    for device in devices:
        print(
            f"\n{device} ({device.device_kind}), process {jax.process_index()}, {dtype.name}, {path}"
        )
        with jax.default_device(device):
            run = jax.jit if path != "eager" else lambda function: function
            failures = check_device(run, sizes, dtype, is_compiled=path != "eager")
        for failure in failures:
            print(f"FAILED {failure}")
        print(f"{len(failures)} failures, largest error allowed {100 * limit(dtype):.3f} %")
        count += len(failures)
    return count


def experiment() -> None:
    """Every path that was asked for; status 1 after any failure."""
    unknown = [path for path in FLAGS.paths if path not in PATHS]
    if unknown or not FLAGS.paths:
        raise InputError(f"--paths has {unknown}: choose from {', '.join(PATHS)}")
    if not FLAGS.sizes or not all(size.isdigit() and int(size) > 2 for size in FLAGS.sizes):
        raise InputError(f"--sizes is {FLAGS.sizes}: give whole numbers from 3, joined by commas")
    sizes, dtype = [int(size) for size in FLAGS.sizes], jnp.dtype(FLAGS.dtype)
    flags_of_xla, count = os.environ.get("XLA_FLAGS", ""), 0
    # The other process goes first: this one may take the whole memory of an accelerator once it starts.
    for path in sorted(FLAGS.paths, reverse=True):
        if path == "jit_noalgsimp" and NO_ALGSIMP not in flags_of_xla:
            options = [
                f"--dtype={dtype.name}",
                f"--paths={path}",
                f"--sizes={','.join(FLAGS.sizes)}",
            ]
            child = subprocess.run(
                [sys.executable, "-m", "launch.fp16_stability", *options],
                env=os.environ | {"XLA_FLAGS": f"{flags_of_xla} {NO_ALGSIMP}".strip()},
                check=False,
            )
            count += child.returncode != 0
        else:
            count += check_path(path, sizes, dtype)
        sys.stdout.flush()
    if count:
        sys.exit(1)


if __name__ == "__main__":
    program.main(experiment)
