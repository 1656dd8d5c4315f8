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
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import flags

from edgespeech.errors import InputError
from edgespeech.evaluation.low_precision import (
    Result,
    canaries,
    check,
    families,
    limit,
    operators,
    value_and_gradient,
)
from edgespeech.evaluation.rounding_oracle import compiled_floats, traced_floats
from experiments import program

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(program)

DTYPES = ("float16", "bfloat16", "float8_e5m2", "float8_e4m3fn")
PATHS = ("eager", "jit", "jit_noalgsimp")
SIZES = (144, 256, 511, 512, 1024, 2048)
NO_ALGSIMP = "--xla_disable_hlo_passes=algsimp"
flags.DEFINE_enum("dtype", "float16", DTYPES, "Format of the activations.")
flags.DEFINE_list("paths", list(PATHS), "How programs run: " + ", ".join(PATHS) + ".")
flags.DEFINE_list("sizes", [str(n) for n in SIZES], "Elements of a row.")


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
