"""ONNX graphs in ONNX Runtime against the JAX functions that they were made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from edgespeech.errors import InputError
from edgespeech.interop.onnx_export import to_onnx
from edgespeech.nn import transformer
from edgespeech.nn.transformer import FeedForward
from edgespeech.ops.conv import conv1d, depthwise_conv

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


def run_graph(function, *arrays, outputs=("y",)):
    """What ONNX Runtime makes of a function's graph, which must also pass ONNX's checker."""
    inputs = {
        f"x{i}": jax.ShapeDtypeStruct(array.shape, array.dtype) for i, array in enumerate(arrays)
    }
    model = to_onnx(function, inputs, outputs)
    onnx.checker.check_model(model, full_check=True)
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(list(outputs), dict(zip(inputs, arrays, strict=True))), model


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def take_rows(x, i):
    return jnp.take(x, i, axis=1)


SNIPPETS = {
    "arithmetic": (lambda x: jnp.sqrt(jnp.abs(x)) / (2 + x**2) - jnp.exp(-x) + x**3, (3, 4)),
    "activations": (
        lambda x: jax.nn.gelu(x, approximate=False) + jax.nn.gelu(x) + jax.nn.silu(jnp.tanh(x)),
        (3, 4),
    ),
    "rounding": (lambda x: jnp.round(3 * x) + jnp.floor(x) * jnp.ceil(x) + jnp.sign(x), (3, 4)),
    "remainder": (lambda x: lax.rem(10 * x, jnp.full_like(x, 3.0)), (3, 4)),
    "softmax": (lambda x: jax.nn.softmax(x, axis=1) + jax.nn.log_softmax(x, axis=0), (3, 4)),
    "select": (
        lambda x: jnp.where((x > 0) & ~(x >= 1) | (x != x), jnp.clip(x, -0.3, 0.4), -x),
        (3, 4),
    ),
    "select booleans": (
        lambda x: jnp.where(x > 0, x < 1, x < -1).astype(jnp.float32) + jnp.any(x > 1, axis=0),
        (3, 4),
    ),
    "reductions": (lambda x: x.sum(0) + x.max(0) * x.min(0) + x.var(0) + jnp.argmax(x, 0), (5, 4)),
    "unfinished broadcast": (
        lambda x: jnp.broadcast_to(x[:, None, :], (3, 5, 4)).sum((0, 1)) + x[0],
        (3, 4),
    ),
    "running sums": (lambda x: jnp.cumsum(x, 0) + lax.cumsum(x, 0, reverse=True), (9, 2)),
    "running extrema": (lambda x: lax.cummax(x, 0) + lax.cummin(x, 0, reverse=True), (11, 2)),
    "pieces": (
        lambda x: jnp.concatenate([jnp.split(x, (1, 4), 1)[1], x[:, ::-1], x[:, 1::2]], axis=1),
        (2, 6),
    ),
    "stack": (lambda x: jnp.stack([x, 2 * x, x[:, :1] + 0 * x], axis=1), (2, 3)),
    "powers of two": (lambda x: jnp.exp2(-jnp.exp2(x)), (3, 4)),
    "sum into a place": (
        lambda x: x.at[:, 1].add(x[:, 2] * 3).at[0].add(x[1]).at[1, :, 3].add(x[0, :, 0]),
        (2, 3, 4),
    ),
    "padding": (lambda x: lax.pad(x, 1.5, ((1, -1, 0), (-1, 2, 0))), (4, 5)),
    "padding between elements": (lambda x: lax.pad(x, 1.5, ((1, 0, 2), (-1, 2, 1))), (3, 4)),
    "associative scan": (
        lambda x: lax.associative_scan(
            lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (jnp.tanh(x), x), axis=1
        )[1],
        (2, 7, 3),
    ),
    "nothing": (lambda x: x + x[:, :0].reshape(0, 1, 3).sum(), (3, 4)),
    "transposed": (lambda x: x.transpose(2, 0, 1).reshape(4, 6)[:, None], (2, 3, 4)),
    "gather": (lambda x: take_rows(x, np.array([[2, 0], [1, 2]])) * x[:, :1, None], (4, 3)),
    "windows": (lambda x: x[:, np.arange(3)[:, None] * 2 + np.arange(4)], (2, 9)),
    "take along an axis": (
        lambda x: (
            jnp.take_along_axis(x, jnp.argsort(np.arange(6)[::-1])[None, :, None] + 0, 1)
            + jnp.take_along_axis(x, jnp.argmax(x, 1, keepdims=True)[:, :, :1], 1)
        ),
        (2, 6, 3),
    ),
    "spectrum": (
        lambda x: jnp.square(jnp.fft.rfft(x, n=16).real) + 2 * jnp.fft.rfft(x, n=16).imag,
        (2, 3, 12),
    ),
    "attention": (lambda x: jnp.einsum("bnhc,bmhc->bhnm", x, 2 * x), (2, 5, 3, 4)),
    "outer": (lambda x: jnp.einsum("ij,kl->kijl", x, x), (2, 3)),
    "contracted first": (lambda x: jnp.einsum("in,oi->no", x, np.eye(3, 4).T), (3, 5)),
    "scan": (
        lambda x: lax.scan(lambda c, r: (0.5 * c + r, c * r[0]), jnp.ones(3), x, reverse=True)[1],
        (4, 3),
    ),
    "map": (lambda x: lax.map(lambda r: r[::-1] * 2, x), (4, 3)),
    "checkpoint": (jax.checkpoint(lambda x: jnp.sin(x) * jnp.cos(x)), (4, 3)),
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_primitives(name):
    function, shape = SNIPPETS[name]
    x = random(*shape)
    (got,), _ = run_graph(function, x)
    want = np.asarray(function(jnp.asarray(x)))
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups):
    x, kernel = random(2, 11, 4), random(3, 4 // groups, 6, seed=1)
    (got,), _ = run_graph(lambda x: conv1d(x, kernel, 2, groups), x)
    np.testing.assert_allclose(got, conv1d(x, kernel, 2, groups), rtol=1e-5, atol=1e-5)


def test_depthwise_convolution_is_one_node():
    x, kernel, length = random(2, 11, 4), random(5, 4, seed=1), np.int32(np.array([11, 7]))

    def function(x, lengths):
        return depthwise_conv(x, kernel, jnp.arange(11) < lengths[:, None])

    (got,), model = run_graph(function, x, length)
    np.testing.assert_allclose(got, function(x, length), rtol=1e-5, atol=1e-5)
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("Conv") == 1
    assert "Slice" not in ops


def test_feed_forward_in_blocks(monkeypatch):
    """As long audio has it: a loop over blocks of frames, which is unrolled here."""
    module = FeedForward(12, 24, 0.0, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    x = np.random.default_rng(0).normal(size=(2, 29, 12)).astype(np.float32)
    want = module(x)
    monkeypatch.setattr(transformer, "BLOCK", 8)
    (got,), model = run_graph(lambda x: nnx.merge(graphdef, state)(x), x)
    assert [node.op_type for node in model.graph.node].count("MatMul") == 2 * 4
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_what_depends_on_no_input_is_a_constant():
    kernel = random(6, 4)

    def function(x):
        normalised = kernel * lax.rsqrt(jnp.sum(jnp.square(jnp.asarray(kernel)), 0))
        return x @ normalised

    _, model = run_graph(function, random(3, 6))
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Identity"]
    (weights,) = model.graph.initializer
    want = kernel / np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(onnx.numpy_helper.to_array(weights), want, rtol=1e-6)


def test_what_no_output_needs_is_left_out():
    kernel = random(4, 4)

    def function(x):
        _ = jnp.tanh(x @ kernel)
        return x + 1

    _, model = run_graph(function, random(3, 4))
    assert [node.op_type for node in model.graph.node] == ["Add", "Identity"]
    assert len(model.graph.initializer) == 1


def test_large_constants_are_not_spread_out():
    (got,), model = run_graph(lambda x: x + jnp.ones((400, 400)).sum(0), random(1))
    assert got[0] == pytest.approx(400 + random(1)[0])
    assert model.ByteSize() < 10_000


def test_unknown_primitive_is_named():
    with pytest.raises(InputError, match="the primitive 'while' has no rule"):
        run_graph(lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x), random(2))
    with pytest.raises(InputError, match="sums into places that are computed"):
        run_graph(lambda x, i: x.at[i].add(1.0), random(4), np.int32(2))
    with pytest.raises(InputError, match="returns 1 arrays for 2 names"):
        run_graph(lambda x: x, random(2), outputs=("y", "z"))
