"""SepFormer: published sizes, a float64 forward pass, an identity without seams, padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.conversion.layers import mixer_layers
from edgespeech.errors import InputError
from edgespeech.models.sepformer import SepFormer, SepFormerConfig
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA, LPAConfig
from edgespeech.ops.sisnr import si_snr_loss
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.modules import randomize
from tests.support.sepformer import sepformer

SMALL = SepFormerConfig(
    num_speakers=2,
    num_filters=12,
    width=8,
    kernel_size=8,
    chunk_length=6,
    num_blocks=2,
    num_intra_layers=2,
    num_inter_layers=1,
    num_heads=2,
    ffn_width=12,
)
ONE_LAYER = dataclasses.replace(SMALL, num_blocks=1, num_intra_layers=1)
call = nnx.jit(lambda model, x, lengths: model(x, lengths))


def make(config=SMALL, seed=0):
    return randomize(SepFormer(config, rngs=nnx.Rngs(seed)), seed, scale=0.2)


def audio(*shape, seed=1):
    return np.float32(0.1 * np.random.default_rng(seed).normal(size=shape))


# ---------------------------------------------------------------------------- published figures


@pytest.fixture(scope="module")
def wham():
    return nnx.eval_shape(lambda: SepFormer(SepFormerConfig.wham(), rngs=nnx.Rngs(0)))


def test_wham_has_the_published_numbers_of_parameters(wham):
    assert count_parameters(wham.mask_network) == 25_605_377
    intra = [layer for block in wham.mask_network.blocks for layer in block.intra.layers]
    assert [count_parameters(layer.mixer) for layer in intra] == [263_168] * 16
    assert count_parameters(wham) - 25_605_377 == 2 * 16 * 256
    assert wham.config.num_frames(8000) == 999


def test_every_layer_has_a_slot(wham):
    layers = mixer_layers(wham)
    assert len(layers) == 32
    assert sum("intra" in path for path in layers) == 16
    assert all(type(layer.mixer) is SelfAttention for layer in layers.values())


def test_tiny_has_as_many_intra_layers_as_wham():
    model = nnx.eval_shape(lambda: SepFormer(SepFormerConfig.tiny(), rngs=nnx.Rngs(0)))
    assert sum("intra" in path for path in mixer_layers(model)) == 16
    assert count_parameters(model) == 714_817


# --------------------------------------------------------------------------------- forward pass


def test_forward_pass_and_padding():
    model, x, lengths = make(), audio(3, 97), (97, 58, 3)
    model.mask_network.scan_layers = True
    out = padding_contract(
        lambda x, n: call(model, x, n).estimates.swapaxes(1, 2), x, lengths, rows=(1, 2)
    )
    w, result = reference.parameters(model), call(model, x, np.array(lengths))
    assert result.lengths.tolist() == [24, 14, 1]
    for row, (t, n) in enumerate(zip(lengths, result.lengths, strict=True)):
        estimates, masks = sepformer(w, SMALL, np.float64(x[row, :t]))
        np.testing.assert_allclose(out[row, :t].T, estimates, atol=2e-5)
        np.testing.assert_allclose(result.masks[row, :, :n], masks, atol=2e-4)
        np.testing.assert_array_equal(out[row, t:], 0.0)
    assert len(result.hidden) == 4
    assert result.hidden[0].shape == (3 * 10, 6, 8)


@pytest.mark.parametrize("t", [1, 7, 8, 9, 24, 203])
def test_identity_has_no_seam(t):
    """With masks of 1, filters that pass a signal and its negative add up to the signal, twice where frames overlap."""
    config = dataclasses.replace(ONE_LAYER, num_speakers=1, num_filters=16, width=16)
    model = SepFormer(config, rngs=nnx.Rngs(0))
    model.encoder[:, 0] = jnp.concatenate([jnp.eye(8), -jnp.eye(8)], axis=1)
    model.decoder[...] = model.encoder[...]
    network = model.mask_network
    for linear in (network.output, network.gate):
        linear.kernel[...] = 0 * linear.kernel[...]
        linear.bias[...] = jnp.full(16, 30.0)  # tanh and sigmoid are 1
    network.expand.kernel[...] = jnp.eye(16)
    x, padded = audio(2, t), audio(2, 300, seed=2)
    padded[:, :t] = x
    frames = max(1, -(-t // 4) - 1)
    coverage = np.zeros((frames + 1) * 4)
    for i in range(frames):
        coverage[4 * i : 4 * i + 8] += 1
    for given in (padded, x) if t in (9, 203) else (padded,):
        out = call(model, given, jnp.full(2, t)).estimates[:, 0]
        np.testing.assert_allclose(out[:, :t], x * coverage[:t], rtol=1e-6)
        np.testing.assert_array_equal(out[:, t:], 0.0)


def test_level_goes_through():
    # The norm ahead of the masks takes the level out: what comes out follows what goes in.
    model, x = make(ONE_LAYER), audio(1, 80)
    n = np.array([80])
    quiet, loud = (call(model, level * x, n).estimates for level in (0.1, 1.0))
    np.testing.assert_allclose(10 * quiet, loud, atol=1e-4)
    assert np.abs(loud).max() > 0.1


def test_silence_is_silent_and_its_gradient_finite():
    model, n = make(ONE_LAYER), np.array([40, 0])
    graphdef, params = nnx.split(model)

    def loss(params, x):
        estimates = nnx.merge(graphdef, params)(x, n).estimates
        return si_snr_loss(estimates, jnp.ones((2, 2, 40)) * jnp.arange(40), n), estimates

    grad = jax.jit(jax.grad(loss, has_aux=True))
    gradient, estimates = grad(params, jnp.zeros((2, 40)))
    np.testing.assert_array_equal(estimates, 0.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_lpa_in_the_slots_keeps_padding_out():
    model, x, lengths = make(ONE_LAYER), audio(2, 97), (97, 58)
    lpa = LPAConfig(
        aperiodic=1, runs=0, periodic=1, positional=1, mean=0, kernel_size=3, local_kernel_size=3
    )
    for layer in model.mask_network.blocks[0].intra.layers:
        layer.mixer = LPA.from_attention(layer.mixer, lpa, rngs=nnx.Rngs(0))
    attention = call(make(ONE_LAYER), x, np.array(lengths)).estimates
    out = padding_contract(
        lambda x, n: call(model, x, n).estimates.swapaxes(1, 2), x, lengths, rows=(1,)
    )
    assert np.abs(out.swapaxes(1, 2) - attention).max() > 1e-3


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_speakers": 3}, "num_speakers is 3"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"chunk_length": 5}, "chunk_length is 5: it must be even"),
        ({"kernel_size": 15}, "kernel_size is 15: it must be even"),
        ({"num_heads": 3}, "num_heads is 3, which does not divide"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **change)


def test_audio_without_samples_is_refused():
    with pytest.raises(InputError, match="has no samples"):
        make()(jnp.zeros((2, 0)), jnp.zeros(2, int))
