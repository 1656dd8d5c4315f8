"""The checks of the suite themselves: each has to see what it is there for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from jax import lax

from edgespeech.errors import InputError
from edgespeech.evaluation.low_precision import Operator, canaries, families, relative_error
from edgespeech.evaluation.rounding_oracle import compiled_floats, oracle, traced_floats
from edgespeech.ops import norm
from edgespeech.ops.norm import lp_normalize, lp_normalize_reference
from launch import fp16_stability as suite

FLOAT16 = jnp.dtype(jnp.float16)
X = families(144, FLOAT16)["N"]


def test_hidden_float32_is_seen():
    def hidden(x):
        return x / jnp.sqrt(jnp.mean(x.astype(jnp.float32) ** 2)).astype(x.dtype)

    assert traced_floats(hidden, X) == {"float16", "float32"}
    assert "f32" in compiled_floats(hidden, X)
    assert "float32" in traced_floats(lambda x: lax.map(hidden, x), X)
    assert traced_floats(lambda x: x * 2 + 1, X) == {"float16"}


def test_code_that_widens_is_a_living_canary():
    def widened(function):
        return lambda x: function(x.astype(jnp.float32))

    assert len(canaries(widened, FLOAT16)) == 2


def test_oracle_rounds_every_operation():
    x = np.float16([300.0, 3.0])
    with np.errstate(over="ignore"):
        want = x * x / x
    np.testing.assert_array_equal(oracle(lambda x: x * x / x, x)[0], want)
    y = np.float16(np.random.default_rng(0).normal(size=(3, 40)))
    with np.errstate(all="ignore"):
        want = np.sqrt(np.abs(y - y[:, :1] * np.float16(0.1))) / np.exp(y) + y * y * y
    got = oracle(
        lambda y: lax.sqrt(jnp.abs(y - y[:, :1] * 0.1)) / lax.exp(y) + lax.integer_pow(y, 3), y
    )[0]
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, want)


def test_errors_are_of_the_row_and_saturation_is_not_one():
    want = np.array([[1.0, 100.0], [3e5, 1e-9]])
    got = np.float16([[1.5, 100.0], [65504.0, 0.0]])
    assert relative_error(got, want) == pytest.approx(0.005)
    assert relative_error(np.float16([[65504.0, 0.0]]), np.array([[-3e5, 0.0]])) > 1
    assert relative_error(np.float16([[np.nan, 0.0]]), np.zeros((1, 2))) == np.inf
    assert relative_error(np.float16([[np.inf, 0.0]]), np.array([[1e9, 0]])) == np.inf
    # Half of the smallest number, 2^-25, is half a rounding unit of 2^-14.
    small = relative_error(np.float16([[0.0]]), np.array([[2.9e-8]]))
    assert small == pytest.approx(2.9e-8 / 6.1035e-5, rel=1e-3)


@pytest.mark.parametrize("constant", [1.0, 2.0])
def test_a_wrong_range_constant_fails(monkeypatch, constant):
    monkeypatch.setattr(norm, "range_constant", lambda n, p, dtype: constant)
    monkeypatch.setattr(norm, "_clip", lambda x, limit: x)
    x = families(1024, FLOAT16)["one-hot 6e4"]
    y = jax.jit(lambda x: lp_normalize(x))(x)
    assert not relative_error(y, lp_normalize_reference(x)) <= 4e-3


def run(**values):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**values):
        suite.experiment()


def test_any_failure_ends_with_status_1(monkeypatch, capsys):
    def naive(x):
        d = x - lax.reduce_sum(x, (1,))[:, None] * (1.0 / x.shape[1])
        return d / lax.sqrt(lax.reduce_sum(d * d, (1,))[:, None] * (1.0 / x.shape[1]) + 1e-5)

    def reference(x):
        return lp_normalize_reference(x)

    operator = Operator(naive, reference, norm.lp_normalize_gradient_reference)
    monkeypatch.setattr(suite, "operators", lambda dtype: {"naive": operator})
    with pytest.raises(SystemExit) as stop:
        run(paths=["jit"], sizes=["16"])
    assert stop.value.code == 1
    assert "FAILED naive, 300 N, n = 16: value error" in capsys.readouterr().out


def test_bad_flags():
    with pytest.raises(
        InputError, match=r"--paths has .'fast'.: choose from eager, jit, jit_noalgsimp"
    ):
        run(paths=["jit", "fast"])
    for sizes in (["2"], ["many"], []):
        with pytest.raises(InputError, match=r"--sizes is .*whole numbers from 3"):
            run(sizes=sizes)
