"""The streaming convolution module against loops, and its contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.causal_conv import StreamingConvolution, chunk_limited_conv
from tests.support import reference
from tests.support.modules import randomize
from tests.support.streaming import verify_streaming_contract

D, K = 6, 5
call = nnx.jit(lambda module, x, lengths: module(x, lengths))


def make(reach, chunk=1, kernel_size=K, norm="layer", dropout_rate=0.0):
    module = StreamingConvolution(
        D, kernel_size, dropout_rate, reach=reach, chunk=chunk, norm=norm, rngs=nnx.Rngs(0)
    )
    return randomize(module)


def limited(x, kernel, chunk):
    """Centred depthwise convolution of `[n d]` that sees nothing beyond the end of a frame's chunk."""
    half, y = len(kernel) // 2, np.zeros_like(x)
    for i in range(len(x)):
        end = min(len(x), (i // chunk + 1) * chunk)
        for j in range(max(0, i - half), min(end, i + half + 1)):
            y[i] += kernel[j - i + half] * x[j]
    return y


def inputs(batch, n, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, n, D)).astype(np.float32)


@pytest.mark.parametrize(("kernel_size", "chunk"), [(5, 1), (5, 3), (7, 2), (3, 4), (5, 100)])
def test_chunk_limited_convolution(kernel_size, chunk):
    x = inputs(1, 11)
    kernel = np.float32(np.random.default_rng(0).normal(size=(kernel_size, D)))
    padded = np.pad(x, ((0, 0), (kernel_size // 2, 0), (0, 0)))
    got = jax.jit(chunk_limited_conv)(padded, kernel, chunk)
    np.testing.assert_allclose(got[0], limited(x[0], kernel, chunk), atol=1e-5)


@pytest.mark.parametrize(("reach", "chunk"), [("causal", 1), ("chunk", 3)])
def test_module_matches_the_equation(reach, chunk):
    module, x, lengths = make(reach, chunk), inputs(2, 10), np.array([10, 7])
    w = reference.parameters(module)
    out = call(module, x, lengths)
    for row, n in enumerate(lengths):
        y = reference.layer_norm(reference.part(w, "norm"), np.float64(x[row, :n]))
        y = reference.linear(reference.part(w, "expand"), y)
        y = y[:, :D] * reference.sigmoid(y[:, D:])
        if reach == "causal":
            y = reference.depthwise_conv(y, w["depthwise"], causal=True)
        else:
            y = limited(y, w["depthwise"], chunk)
        y = reference.layer_norm(reference.part(w, "middle_norm"), y + w["depthwise_bias"])
        y = reference.linear(reference.part(w, "contract"), y * reference.sigmoid(y))
        np.testing.assert_allclose(out[row, :n], y, atol=2e-5)


@pytest.mark.parametrize(("reach", "chunk", "kernel_size"), [("causal", 1, 5), ("chunk", 2, 7)])
def test_streaming_contract(reach, chunk, kernel_size):
    module = make(reach, chunk, kernel_size)
    verify_streaming_contract(module, inputs, length=17)


def test_one_program_for_all_chunk_sizes():
    module, x, lengths = make("chunk", 3), inputs(1, 10), np.array([10])
    traces = []

    @nnx.jit
    def run(module, chunk):
        traces.append(chunk)
        return module(x, lengths, chunk)

    for size in (2, 3):
        want = call(make("chunk", size), x, lengths)
        np.testing.assert_allclose(run(module, jnp.int32(size)), want, atol=1e-6)
    assert len(traces) == 1


def test_dropout_needs_a_key():
    module, x, lengths = make("causal", dropout_rate=0.5), inputs(1, 200), np.array([200])
    dropped = nnx.jit(lambda m, key: m(x, lengths, key=key))(module, jax.random.key(0))
    assert (dropped == 0).mean() == pytest.approx(0.5, abs=0.05)
    kept = np.asarray(dropped != 0)
    whole = np.asarray(call(module, x, lengths))
    np.testing.assert_allclose(np.asarray(dropped)[kept], 2 * whole[kept], rtol=1e-5)


def test_bad_input():
    for arguments, message in (
        ({"reach": "causal", "kernel_size": 4}, "is 4: it must be odd"),
        ({"reach": "both"}, "'both': choose causal, chunk"),
        ({"reach": "chunk", "chunk": 0}, "is 0: it must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            make(**arguments)
    module = make("chunk", 3)
    with pytest.raises(InputError, match="array of 4 frames: pad it to a multiple of 3"):
        module.step(jnp.zeros((1, 4, D)), jnp.array([4]), module.init_state(1))
