"""The encoder: sizes from the published model, a float64 forward pass, padding, scan against loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config, count_parameters
from edgespeech.nn.front_end import WAV2VEC2_STRIDES
from edgespeech.ops.features import SpecAugmentConfig
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.modules import randomize

SMALL = {"width": 16, "num_heads": 2, "ffn_width": 24, "vocab_size": 5, "front_channels": 6}
WAVEFORM = Wav2Vec2Config(num_layers=2, position_kernel=4, position_groups=4, **SMALL)
LOGMEL = dataclasses.replace(
    Wav2Vec2Config.tiny(),
    num_layers=2,
    num_mels=10,
    conv_strides=2,
    conv_blocks=1,
    position_kernel=5,
    position_groups=16,
    **SMALL,
)
SHORT = SpecAugmentConfig(frequency_width=4, time_mask_rate=0.3, time_width=4)

call = nnx.jit(lambda model, audio, lengths: model(audio, lengths))


def make(config, seed=0):
    return randomize(Wav2Vec2(config, rngs=nnx.Rngs(seed)), seed, scale=0.1)


def audio(lengths=(2400, 1700), seed=1):
    x = 0.1 * np.random.default_rng(seed).normal(size=(len(lengths), max(lengths)))
    return np.float32(x), jnp.array(lengths)


# ---------------------------------------------------------------------------- published figures


@pytest.fixture(scope="module")
def base():
    return nnx.eval_shape(lambda: Wav2Vec2(Wav2Vec2Config.base(), rngs=nnx.Rngs(0)))


def test_base_has_the_published_number_of_parameters(base):
    assert count_parameters(base) == 94_396_320


def test_parts_of_base(base):
    assert count_parameters(base.front_end) == 4_200_448
    assert count_parameters(base.projection_norm) + count_parameters(base.projection) == 395_008
    assert count_parameters(base.positions) == 4_719_488
    assert [count_parameters(layer) for layer in base.layers] == [7_087_872] * 12
    assert count_parameters(base.head) == 24_608
    assert count_parameters(base.norm) == 2 * 768  # and 768 of the mask embedding


@pytest.mark.parametrize(("seconds", "frames"), [(10, 499), (30, 1499), (60, 2999), (120, 5999)])
def test_frames_of_base(seconds, frames):
    assert Wav2Vec2Config.base().num_frames(16_000 * seconds) == frames


def test_audio_too_short_for_a_frame_is_refused():
    model = make(LOGMEL)
    assert LOGMEL.num_frames(1359) == 0 < LOGMEL.num_frames(1360)
    with pytest.raises(InputError, match="1359 samples"):
        model(jnp.zeros((1, 1359)), jnp.array([1359]))


@pytest.mark.parametrize(("preset", "seconds"), [("base", 0.02), ("tiny", 0.08), ("small", 0.08)])
def test_duration_of_a_frame(preset, seconds):
    config = getattr(Wav2Vec2Config, preset)()
    assert config.frame_seconds == pytest.approx(seconds)
    more = config.num_frames(16_000 * 9) - config.num_frames(16_000)
    assert more * config.frame_seconds == pytest.approx(8.0, abs=seconds)


# -------------------------------------------------------------------------------- forward pass


def forward(w, config, x):
    """Logits of one utterance `[t]`, float64."""
    front = reference.part(w, "front_end")
    if config.front_end == "waveform":
        x = reference.waveform_front_end(front, x, WAV2VEC2_STRIDES)
    else:
        sizes = config.num_mels, config.conv_strides, config.conv_blocks
        x = reference.logmel_front_end(front, x, *sizes)
    x = reference.layer_norm(reference.part(w, "projection_norm"), x)
    x = reference.linear(reference.part(w, "projection"), x)
    positions = reference.part(w, "positions")
    x = x + reference.conv_positions(positions, x, config.position_groups)
    norm = reference.part(w, "norm")
    if not config.norm_first:
        x = reference.layer_norm(norm, x)
    for index in range(config.num_layers):
        layer = reference.part(w, f"layers.{index}")
        x = reference.encoder_layer(layer, x, config.num_heads, config.norm_first)
    if config.norm_first:
        x = reference.layer_norm(norm, x)
    return reference.linear(reference.part(w, "head"), x)


@pytest.mark.parametrize("config", [WAVEFORM, LOGMEL], ids=["waveform", "logmel"])
def test_forward_pass_and_padding(config):
    model, (x, lengths) = make(config), audio()
    model.scan_layers = True
    out = padding_contract(
        lambda x, n: call(model, x, n).logits,
        x,
        lengths,
        rows=(1,),
        out_length=config.num_frames,
        atol=2e-5,
    )
    w = reference.parameters(model)
    frames = [config.num_frames(int(t)) for t in lengths]
    assert [int(n) for n in call(model, x, lengths).lengths] == frames
    for row, (t, n) in enumerate(zip(lengths, frames, strict=True)):
        want = forward(w, config, np.float64(x[row, : int(t)]))
        assert len(want) == n
        np.testing.assert_allclose(out[row, :n], want, atol=1e-4)


def test_upstream_padding_counts_as_audio():
    """The row is one utterance, zeros included; its text ends where it ended."""
    config = dataclasses.replace(WAVEFORM, padding="upstream")
    model, (x, lengths) = make(config), audio()
    x[1, 1700:] = np.nan
    out = call(model, x, lengths)
    w = reference.parameters(model)
    for row, t in enumerate((2400, 1700)):
        zeros = np.zeros(2400 - t)
        utterance = np.float64(x[row, :t])
        want = forward(w, config, np.concatenate([utterance - utterance.mean(), zeros]))
        np.testing.assert_allclose(out.logits[row], want, atol=1e-4)
        assert out.lengths[row] == config.num_frames(t)
    exact = call(make(WAVEFORM), x, lengths)
    n = int(out.lengths[1])
    assert np.abs(exact.logits[1, :n] - out.logits[1, :n]).max() > 1e-2


def test_upstream_padding_needs_the_waveform_front_end():
    with pytest.raises(InputError, match=r"padding is 'upstream' and model.front_end 'logmel'"):
        dataclasses.replace(LOGMEL, padding="upstream")


def test_hidden_states_lead_to_the_logits():
    model, (x, lengths) = make(LOGMEL), audio()
    model.scan_layers = True
    out = call(model, x, lengths)
    assert len(out.hidden) == LOGMEL.num_layers
    np.testing.assert_allclose(model.logits(out.hidden[-1], out.lengths), out.logits, atol=1e-5)
    w = reference.parameters(model)
    layer, first = reference.part(w, "layers.1"), np.float64(out.hidden[0][0])
    want = reference.encoder_layer(layer, first, LOGMEL.num_heads, True)
    np.testing.assert_allclose(out.hidden[1][0], want, atol=5e-5)


@pytest.mark.parametrize("config", [WAVEFORM, LOGMEL], ids=["waveform", "logmel"])
def test_gradient_ignores_padding_and_an_utterance_without_frames(config):
    config = dataclasses.replace(config, num_layers=1)
    model, (x, lengths) = make(config), audio((2400, 1700, 100))

    @nnx.jit
    def gradient(model, x):
        def loss(model):
            out = model(x, lengths)
            valid = jnp.arange(out.logits.shape[1])[None] < out.lengths[:, None]
            return jnp.sum(jnp.where(valid[..., None], out.logits, 0.0) ** 2)

        return nnx.grad(loss)(model)

    valid = jnp.arange(x.shape[1])[None] < lengths[:, None]
    want = reference.parameters_of_state(gradient(model, x))
    got = reference.parameters_of_state(gradient(model, jnp.where(valid, x, jnp.nan)))
    assert sum(np.any(grad != 0) for grad in want.values()) > 0.9 * len(want)
    for name, grad in want.items():
        assert np.isfinite(grad).all(), name
        np.testing.assert_array_equal(got[name], grad, err_msg=name)


@pytest.mark.parametrize(
    ("config", "with_key"), [(WAVEFORM, False), (LOGMEL, True)], ids=["waveform", "logmel-key"]
)
def test_scan_layers_changes_nothing(config, with_key):
    config = dataclasses.replace(config, spec_augment=SHORT)
    x, lengths = audio((1700, 1300))
    key = jax.random.key(0) if with_key else None
    results = []
    for scan in (False, True):
        model = make(config)
        model.scan_layers = scan
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, graphdef=graphdef, rest=rest):
            out = nnx.merge(graphdef, params, rest, copy=True)(x, lengths, key)
            return jnp.mean(out.logits**2) + jnp.mean(out.hidden[0] ** 2), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        results.append((out, reference.parameters_of_state(grads)))
    (loop, loop_grads), (scan, scan_grads) = results
    np.testing.assert_allclose(scan.logits, loop.logits, atol=2e-5)
    for a, b in zip(loop.hidden, scan.hidden, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5)
    for name, want in loop_grads.items():
        scale = max(1.0, np.abs(want).max())
        np.testing.assert_allclose(scan_grads[name], want, atol=5e-5 * scale, err_msg=name)


def test_key_means_training():
    config = dataclasses.replace(WAVEFORM, num_layers=1, spec_augment=SHORT, dropout=0.0)
    model, (x, lengths) = make(config), audio()
    train = nnx.jit(lambda model, key: model(x, lengths, key).hidden[0])
    plain = call(model, x, lengths).hidden[0]
    masked = train(model, jax.random.key(0))
    np.testing.assert_array_equal(masked, train(model, jax.random.key(0)))
    assert np.abs(masked - plain).max() > 1e-2
    # Masked frames are the learned vector: they alone feel it.
    model.mask_embedding[...] = model.mask_embedding[...] + 1.0
    np.testing.assert_array_equal(call(model, x, lengths).hidden[0], plain)
    assert np.abs(train(model, jax.random.key(0)) - masked).max() > 1e-2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("num_layers", 0),
        ("conv_strides", 0),
        ("position_groups", 0),
        ("position_kernel", 0),
        ("num_mels", -1),
        ("conv_blocks", -1),
        ("num_heads", 7),
        ("position_groups", 5),
        ("dropout", 1.0),
        ("front_end", "mfcc"),
        ("padding", "none"),
    ],
)
def test_config_names_what_is_wrong(field, value):
    with pytest.raises(InputError, match=rf"model\.{field} is {value!r}"):
        Wav2Vec2Config(**{field: value})
