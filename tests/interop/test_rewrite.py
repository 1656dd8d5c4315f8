"""Functions without loops and without complex numbers: the same values, and nothing of the kind left in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from edgespeech.errors import InputError
from edgespeech.interop.rewrite import real_transform, unrolled


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def primitives(function, *arrays):
    """Names of what the program of a function does, calls opened."""
    return {equation.primitive.name for equation in jax.make_jaxpr(function)(*arrays).jaxpr.eqns}


def nested(x):
    """A scan from the end inside a map, with a carry that is used on."""

    def row(r):
        last, y = lax.scan(lambda c, v: (0.5 * c + v, c * v), r[0], r, reverse=True)
        return last, y

    last, y = lax.map(jax.checkpoint(jax.jit(row)), x)
    return {"sum": last.sum(), "rows": [y, jax.nn.relu(last)]}


def test_loops_are_unrolled():
    x = random(3, 5)
    assert "scan" in primitives(nested, x)
    assert primitives(unrolled(nested), x).isdisjoint({"scan", "jit", "remat2", "checkpoint"})
    got, want = jax.jit(unrolled(nested))(x), nested(x)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_a_row_is_added_without_a_scatter():
    def function(x, i):
        x = jnp.asarray(x)
        return x.at[:, 1].add(x[:, 0]).at[..., i, :].add(2 * x[..., 0, :], mode="drop")

    x = random(2, 4, 3)
    assert "scatter-add" not in primitives(unrolled(function), x, 2)
    for i in (0, 3, 4):  # the last is outside
        np.testing.assert_allclose(unrolled(function)(x, i), function(x, i), rtol=1e-6)
    several = np.array([0, 2])
    np.testing.assert_allclose(
        unrolled(lambda x: jnp.asarray(x).at[:, several].add(1.0))(x),
        x + np.float32([[[1], [0], [1], [0]]]),
    )


@pytest.mark.parametrize("n", [16, 15, 512])
def test_real_transform_is_that_of_numpy(n):
    """Shorter rows than n are padded by whoever calls, as JAX does ahead of its own transform."""
    x = random(2, 3, n)
    want = np.fft.rfft(np.float64(x))
    got = real_transform(x, n)
    np.testing.assert_allclose(got.real, want.real, atol=2e-4)
    np.testing.assert_allclose(got.imag, want.imag, atol=2e-4)


def test_transforms_become_products():
    def power(x):
        spectrum = jnp.fft.rfft(x, n=16)
        return jnp.square(spectrum.real) + 2 * spectrum.imag

    x = random(2, 12)
    assert "fft" in primitives(unrolled(power), x)
    assert "fft" not in primitives(unrolled(power, coreml=True), x)
    got = unrolled(power, coreml=True)(x)
    np.testing.assert_allclose(got, power(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config", [((0, 0, 1), (2, 1, 0)), ((1, 2, 3), (0, 0, 2)), ((-1, 0, 2), (0, -2, 1))]
)
def test_padding_between_elements(config):
    x = random(3, 4)
    got = unrolled(lambda x: lax.pad(x, jnp.float32(7), config), coreml=True)
    kept = [e for e in jax.make_jaxpr(got)(x).jaxpr.eqns if e.primitive.name == "pad"]
    assert kept
    assert not any(between for e in kept for _, _, between in e.params["padding_config"])
    np.testing.assert_array_equal(got(x), lax.pad(x, jnp.float32(7), config))
    one = random(1, 4)  # nothing lies between the elements of an axis of one
    np.testing.assert_array_equal(got(one), lax.pad(one, jnp.float32(7), config))


def test_products_have_few_batch_axes():
    a, b = random(2, 3, 5, 2, 4, 6), random(4, 5, 2, 6, 2, 3, seed=1)

    def function(a, b):
        return jnp.einsum("bhpkic,cpkjbh->bijhpk", a, jnp.moveaxis(b, (0, 3), (3, 0)))

    new = unrolled(function)
    np.testing.assert_allclose(new(a, b), function(a, b), rtol=1e-5, atol=1e-5)
    for equation in jax.make_jaxpr(new)(a, b).jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            assert len(equation.params["dimension_numbers"][1][0]) == 1


@pytest.mark.parametrize("shape", [(1, 3, 6, 2), (2, 3, 6, 2), (2, 1, 6, 1)])
def test_gathers_have_their_batch_axes_in_front(shape):
    """JAX makes a batch axis of every axis longer than 1, wherever it stands."""
    x, index = (
        random(*shape),
        np.array([[5, 0, 0, 2]])[..., None] * np.ones((*shape[:2], 1, 1), int),
    )
    index[:, -1] = 1

    def function(x, index):
        return jnp.take_along_axis(x, index, axis=2)

    new = unrolled(function, coreml=True)
    np.testing.assert_array_equal(new(x, index), function(x, index))
    for equation in jax.make_jaxpr(new)(x, index).jaxpr.eqns:
        if equation.primitive.name == "gather":
            batch = equation.params["dimension_numbers"].operand_batching_dims
            assert batch == tuple(range(len(batch)))


def test_what_has_no_rule_is_named():
    with pytest.raises(InputError, match="'abs' of a complex array has no rule"):
        unrolled(lambda x: jnp.abs(jnp.fft.rfft(x)), coreml=True)(random(8))
    with pytest.raises(InputError, match="a transform of kind FFT over 1 axes"):
        unrolled(lambda x: jnp.fft.fft(x).real, coreml=True)(random(8))
