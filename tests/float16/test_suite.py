"""The float16 suite, reduced: fewer sizes, every row family; `python -m launch.fp16_stability` runs all of it."""

import jax
import jax.numpy as jnp
import pytest

from edgespeech.evaluation.low_precision import (
    canaries,
    check,
    families,
    limit,
    operators,
    value_and_gradient,
)
from edgespeech.evaluation.rounding_oracle import compiled_floats, traced_floats

FLOAT16 = jnp.dtype(jnp.float16)
OPERATORS = operators(FLOAT16)
PATHS = {"eager": lambda function: function, "jit": jax.jit}
assert limit(FLOAT16) == 4e-3

# Eagerly the small size alone: every operation is a program of its own there.
CASES = [
    *((name, "eager", 144) for name in ("L2 MAD", "L3 max-abs", "softmax table")),
    *(("L2 MAD", "jit", n) for n in (144, 511, 512, 2048)),
    *((name, "jit", 256) for name in OPERATORS if name != "L2 MAD"),
]


@pytest.mark.parametrize(("name", "path", "n"), CASES)
def test_every_family_is_finite_and_accurate(name, path, n):
    results = check(OPERATORS[name], PATHS[path], n, FLOAT16)
    assert results.keys() == families(n, FLOAT16).keys()
    assert len(results) == 12
    for family, result in results.items():
        for what, error in result._asdict().items():
            assert error <= 4e-3, f"{name}, {family}, n = {n}, {path}: {what}"


@pytest.mark.parametrize("path", PATHS)
def test_naive_code_fails(path):
    assert canaries(PATHS[path], FLOAT16) == []


@pytest.mark.parametrize("name", OPERATORS)
def test_no_float32_hides(name):
    x = families(144, FLOAT16)["N"]
    both = value_and_gradient(OPERATORS[name].call)
    assert traced_floats(both, x, x) == {"float16"}
    if name in ("L2 MAD", "softmax table"):
        assert compiled_floats(both, x, x) == {"f16"}
