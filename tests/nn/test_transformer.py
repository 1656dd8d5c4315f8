"""The encoder layer and its parts against float64 NumPy, and layers in a scan against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.nn import transformer
from edgespeech.nn.token_mixer_controls import Removed
from edgespeech.nn.transformer import ConvPositions, EncoderLayer, FeedForward, run_layers
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.modules import randomize

D, H, WIDTH = 8, 2, 12
LENGTHS = (9, 5, 1)
call = nnx.jit(lambda module, x, lengths: module(x, lengths))


def inputs():
    return np.random.default_rng(1).normal(size=(3, 9, D))


def layer(norm_first, dropout_rate=0.0, seed=0):
    module = EncoderLayer(
        D, H, WIDTH, norm_first=norm_first, dropout_rate=dropout_rate, rngs=nnx.Rngs(seed)
    )
    return randomize(module, seed)


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer(norm_first):
    module, x = layer(norm_first), inputs()
    out = padding_contract(lambda x, n: call(module, x, n), np.float32(x), LENGTHS, rows=(1,))
    w = reference.parameters(module)
    for row, n in enumerate(LENGTHS):
        want = reference.encoder_layer(w, x[row, :n], H, norm_first)
        np.testing.assert_allclose(out[row, :n], want, atol=2e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer_without_mixer_is_its_feed_forward(norm_first):
    module, x = layer(norm_first), inputs()[0]
    module.mixer = Removed()
    w = reference.parameters(module)
    if norm_first:
        y = reference.layer_norm(reference.part(w, "ffn_norm"), x)
        want = x + reference.feed_forward(reference.part(w, "ffn"), y)
    else:
        y = reference.layer_norm(reference.part(w, "mixer_norm"), x)
        y = y + reference.feed_forward(reference.part(w, "ffn"), y)
        want = reference.layer_norm(reference.part(w, "ffn_norm"), y)
    got = call(module, np.float32(x[None]), jnp.array([9]))
    np.testing.assert_allclose(got[0], want, atol=2e-5)


def test_dropout_in_a_layer():
    module = layer(True, dropout_rate=0.4)
    x, lengths = np.float32(inputs()), jnp.array(LENGTHS)
    with_key = nnx.jit(lambda module, key, x: module(x, jnp.full(len(x), x.shape[1]), key))
    a, b = (with_key(module, jax.random.key(0), x) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - with_key(module, jax.random.key(1), x)).max() > 0.1
    assert np.abs(a - call(module, x, lengths))[0].max() > 0.1
    # Each branch of the residual loses 0.4 of its elements: in 0.16 both are gone.
    x = jax.random.normal(jax.random.key(2), (3, 400, D))
    untouched = np.asarray(with_key(module, jax.random.key(3), x) == x)
    assert untouched.mean() == pytest.approx(0.16, abs=0.02)


def test_feed_forward_drops_after_the_activation():
    module = randomize(FeedForward(D, 4000, 0.25, rngs=nnx.Rngs(0)))
    module.contract.kernel[...] = jnp.full((4000, D), 1 / 4000)
    apply = nnx.jit(lambda module, x, key: (module(x), module(x, key)))
    x = np.float32(inputs()[:1, :1])
    full, kept = apply(module, x, jax.random.key(0))
    w = reference.parameters(module)
    np.testing.assert_allclose(full[0], reference.feed_forward(w, np.float64(x[0])), atol=1e-5)
    # The mean over 4000 hidden units survives dropout up to its sampling error.
    hidden = reference.gelu(np.float64(x[0]) @ w["expand.kernel"] + w["expand.bias"])
    deviation = np.sqrt(np.sum(hidden**2) * 0.25 / 0.75) / 4000
    assert 0 < float(jnp.abs(kept - full).max()) < 4 * deviation


# ----------------------------------------------------------------------------- stacked layers


@pytest.mark.parametrize("n", [16, 17, 24, 31])
def test_many_frames_go_through_in_blocks(monkeypatch, n):
    """Values, and gradients of frames and parameters; up to two blocks there is one."""
    module = randomize(FeedForward(D, 24, 0.5, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(n), (2, n, D))
    weights = jax.random.normal(jax.random.key(1), x.shape)

    def run():
        def loss(module, x):
            return jnp.sum(jnp.sin(module(x)) * weights)

        found = nnx.value_and_grad(loss, argnums=(0, 1))(module, x)
        return found, "scan" in str(jax.make_jaxpr(lambda x: module(x))(x))

    whole, looped = run()
    assert not looped
    monkeypatch.setattr(transformer, "BLOCK", 8)
    blocks, looped = run()
    assert looped == (n > 16)
    for a, b in zip(jax.tree.leaves(blocks), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_key", [False, True])
def test_scan_equals_loop(with_key):
    # The first has another structure: it runs by itself, the others in one scan.
    layers = [layer(True, 0.3, seed=index) for index in range(3)]
    layers[0].mixer = Removed()
    graphdef, params, rest = nnx.split(nnx.List(layers), nnx.Param, ...)
    x, lengths = np.float32(inputs()), jnp.array(LENGTHS)
    keys = list(jax.random.split(jax.random.key(0), 3)) if with_key else [None] * 3
    weight = np.float32(np.random.default_rng(2).normal(size=(3, *x.shape)))

    def run(scan):
        def loss(params, x):
            stack = nnx.merge(graphdef, params, rest, copy=True)
            hidden = run_layers(stack, x, lengths, keys, scan=scan)
            return sum(jnp.sum(w * h) for w, h in zip(weight, hidden, strict=True)), hidden

        (_, hidden), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
        return hidden, grads

    (looped, loop_grads), (scanned, scan_grads) = run(False), run(True)
    assert len(looped) == len(scanned) == 3
    for a, b in zip(looped, scanned, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)
    got = reference.parameters_of_state(scan_grads[0])
    for name, want in reference.parameters_of_state(loop_grads[0]).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=2e-4, err_msg=name)
    np.testing.assert_allclose(scan_grads[1], loop_grads[1], rtol=1e-4, atol=2e-4)
    if not with_key:  # every layer's output, in order
        y = np.float64(scanned[0][0])
        for module, got in zip(layers[1:], scanned[1:], strict=True):
            y = reference.encoder_layer(reference.parameters(module), y, H, True)
            np.testing.assert_allclose(got[0], y, atol=5e-5)


# ----------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(("kernel_size", "groups"), [(4, 2), (5, 2), (4, D), (15, D)])
def test_conv_positions(kernel_size, groups):
    module = randomize(ConvPositions(D, kernel_size, groups, rngs=nnx.Rngs(0)))
    x = inputs()
    out = padding_contract(lambda x, n: call(module, x, n), np.float32(x), LENGTHS, rows=(1,))
    w = reference.parameters(module)
    for row, n in enumerate(LENGTHS):
        want = reference.conv_positions(w, x[row, :n], groups)
        np.testing.assert_allclose(out[row, :n], want, atol=2e-5)


def test_gain_is_the_norm_of_every_tap():
    module = ConvPositions(D, 4, 2, rngs=nnx.Rngs(0))
    # At first the kernel is the direction itself.
    np.testing.assert_allclose(module.kernel(), module.direction[...], rtol=1e-6)
    randomize(module)
    taps = np.sqrt(np.sum(np.square(np.float64(module.kernel())), (1, 2)))
    np.testing.assert_allclose(taps, np.abs(module.gain[...]).ravel(), rtol=1e-6)
