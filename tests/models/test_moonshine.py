"""Moonshine: published sizes, a float64 forward pass, padding, the decoder's cache, the mixer's slot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.conversion.capture import capture
from edgespeech.errors import InputError
from edgespeech.interop.hf_moonshine import without_values
from edgespeech.models.moonshine import Moonshine, MoonshineConfig, cast, decoder_input
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.nn.cross_attention import CrossAttention
from edgespeech.nn.rotary import RotarySelfAttention
from edgespeech.nn.token_mixer_controls import Removed
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from tests.support import moonshine as plain
from tests.support.contracts import padding_contract
from tests.support.modules import randomize
from tests.support.moonshine import call, speech, tiny_moonshine

TOKENS = np.array([[1, 5, 7, 3, 0], [1, 9, 4, 10, 6]])


@pytest.fixture(scope="module")
def model():
    return tiny_moonshine()


@pytest.fixture(scope="module")
def output(model):
    audio, lengths = speech()
    return call(*nnx.split(model), audio, lengths, TOKENS, np.array([5, 3]))


# ---------------------------------------------------------------------------- published figures


@pytest.mark.parametrize(("preset", "count"), [("base", 61_513_920), ("tiny", 27_092_736)])
def test_number_of_parameters(preset, count):
    assert count_parameters(without_values(getattr(MoonshineConfig, preset)())) == count


def test_presets():
    base, tiny = MoonshineConfig.base(), MoonshineConfig.tiny()
    sizes = (base.width, base.num_layers, base.num_decoder_layers, base.num_heads, base.ffn_width)
    assert sizes == (416, 8, 8, 8, 1664)
    sizes = (tiny.width, tiny.num_layers, tiny.num_decoder_layers, tiny.num_heads, tiny.ffn_width)
    assert sizes == (288, 6, 6, 8, 1152)
    assert (base.rotary_width, tiny.rotary_width) == (32, 32)  # of 52 and of 36 channels
    assert base.vocab_size == tiny.vocab_size == 32_768
    assert base.frame_seconds == 0.024


@pytest.mark.parametrize(("samples", "frames"), [(894, 0), (895, 1), (1279, 2), (160_000, 415)])
def test_number_of_frames(model, samples, frames):
    assert model.config.num_frames(samples) == frames
    if 0 < samples < 2000:
        audio = jnp.zeros((1, 2000))
        _, lengths = model.front_end(audio, jnp.array([samples]))
        assert lengths.tolist() == [frames]


# ---------------------------------------------------------------------------- values


def test_forward_pass_equals_the_plain_one(model, output):
    audio, lengths = speech()
    for row, u in ((0, 5), (1, 3)):
        n = model.config.num_frames(int(lengths[row]))
        assert output.lengths[row] == n
        wanted = plain.forward(model, np.float64(audio[row, : lengths[row]]), TOKENS[row, :u])
        for found, want in zip(output.hidden, wanted[0], strict=True):
            np.testing.assert_allclose(found[row, :n], want, atol=2e-5)
        np.testing.assert_allclose(output.memory[row, :n], wanted[1], atol=2e-5)
        for found, want in zip(output.decoder_hidden, wanted[2], strict=True):
            np.testing.assert_allclose(found[row, :u], want, atol=2e-5)
        np.testing.assert_allclose(output.logits[row, :u], wanted[3], atol=5e-5)


def test_padding_of_the_audio(model):
    split = nnx.split(model)
    audio, lengths = speech((4000, 2600, 1000))
    tokens = np.array([*TOKENS, TOKENS[0]])

    def logits(audio, lengths):
        rows = len(audio)
        return call(*split, audio, lengths, tokens[:rows], np.full(rows, 5)).memory

    # rows alone take the tokens of row 0, which the encoder's output does not depend on
    padding_contract(logits, audio, lengths, out_length=model.config.num_frames)


def test_logits_are_the_same_alone(model, output):
    audio, lengths = speech()
    alone = call(
        *nnx.split(model), audio[1:, : lengths[1]], lengths[1:], TOKENS[1:, :3], np.array([3])
    )
    np.testing.assert_allclose(alone.logits[0], output.logits[1, :3], atol=1e-5)


def test_a_token_does_not_see_those_after_it(model, output):
    audio, lengths = speech()
    later = TOKENS.copy()
    later[:, 3:] = 8
    changed = call(*nnx.split(model), audio, lengths, later, np.array([5, 3]))
    np.testing.assert_array_equal(changed.logits[:, :3], output.logits[:, :3])
    assert np.abs(changed.logits[0, 3] - output.logits[0, 3]).max() > 0.1


def test_step_by_step_equals_all_at_once(model, output):
    audio, lengths = speech()

    graphdef, state = nnx.split(model)

    @jax.jit
    def steps(state):
        model = nnx.merge(graphdef, state)
        memory, memory_lengths, _ = model.encode(audio, lengths)
        cache = model.init_cache(memory, memory_lengths, 7)  # larger than needed
        logits = []
        for position in range(5):
            tokens = jnp.asarray(TOKENS[:, position])
            after, cache = model.step(tokens, jnp.array(position), cache, memory_lengths)
            logits.append(after)
        return jnp.stack(logits, 1)

    found = steps(state)
    np.testing.assert_allclose(found[0], output.logits[0], atol=1e-5)
    np.testing.assert_allclose(found[1, :3], output.logits[1, :3], atol=1e-5)


def test_scan_equals_the_loop(model, output):
    audio, lengths = speech()
    model.scan_layers = True
    try:
        scanned = call(*nnx.split(model), audio, lengths, TOKENS, np.array([5, 3]))
    finally:
        model.scan_layers = False
    np.testing.assert_allclose(scanned.hidden, output.hidden, atol=1e-5)
    np.testing.assert_allclose(scanned.memory, output.memory, atol=1e-5)


def test_bfloat16(output):
    model = tiny_moonshine()
    cast(model, jnp.bfloat16)
    audio, lengths = speech()
    half = call(*nnx.split(model), audio, lengths, TOKENS, np.array([5, 3]))
    for found, wanted in ((half.memory, output.memory), (half.logits, output.logits)):
        assert found.dtype == jnp.bfloat16
        largest = np.abs(wanted).max()
        np.testing.assert_allclose(np.float32(found), wanted, atol=0.05 * largest)


def test_decoder_input():
    labels = jnp.array([[5, 6, 2], [7, 2, 0]])
    assert decoder_input(labels, 1).tolist() == [[1, 5, 6], [1, 7, 2]]


# ---------------------------------------------------------------------------- the slot


def test_capture_sees_every_encoder_layer(model, output):
    audio, lengths = speech()
    graphdef, state = nnx.split(model)
    found, calls = jax.jit(
        lambda state: capture(
            nnx.merge(graphdef, state), audio, jnp.asarray(lengths), TOKENS, jnp.array([5, 3])
        )
    )(state)
    np.testing.assert_allclose(found.logits, output.logits, atol=1e-5)
    assert len(calls) == 2
    second = model.layers[1]
    residual = found.hidden[0] + calls[1].y
    np.testing.assert_allclose(
        residual + second.ffn(second.ffn_norm(residual)), found.hidden[1], atol=1e-5
    )


def test_any_mixer_fits_the_slot():
    model = tiny_moonshine()
    model.layers[0].mixer = Removed()
    audio, lengths = speech()
    x, frames = model.front_end(jnp.asarray(audio), jnp.asarray(lengths))
    first = model.layers[0]
    found = model.encode(jnp.asarray(audio), jnp.asarray(lengths)).hidden[0]
    want = x + first.ffn(first.ffn_norm(x))
    mask = mask_from_lengths(frames, x.shape[1])
    np.testing.assert_allclose(zero_padding(found, mask), zero_padding(want, mask), atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_keeps_the_mixers_contract(causal):
    mixer = randomize(RotarySelfAttention(8, 2, 2, causal=causal, rngs=nnx.Rngs(0)))
    x = np.float32(np.random.default_rng(0).normal(size=(2, 6, 8)))
    padding_contract(jax.jit(lambda x, n: mixer(x, n)), x, np.array([6, 4]))


def test_cross_attention_does_not_see_padding():
    attention = randomize(CrossAttention(8, 2, rngs=nnx.Rngs(0)))
    x, memory = np.float32(np.random.default_rng(0).normal(size=(2, 2, 6, 8)))
    lengths = jnp.array([6, 4])

    def attend(memory):
        return attention(x, attention.keys_values(jnp.asarray(memory), lengths), lengths)

    nan = memory.copy()
    nan[1, 4:] = np.nan
    np.testing.assert_array_equal(attend(nan), attend(memory))
    short = attention.keys_values(jnp.asarray(memory[1:, :4]), lengths[1:])
    np.testing.assert_allclose(attention(x[1:], short, lengths[1:]), attend(memory)[1:], atol=1e-6)


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "model.width is 0"),
        ({"num_decoder_layers": 0}, "model.num_decoder_layers is 0"),
        ({"num_heads": 3}, "model.num_heads is 3"),
        ({"rotary_factor": 0.5, "width": 12, "num_heads": 2}, "gives 3 of the 6 channels"),
        ({"rotary_factor": 0.1}, "gives 0 of the 8"),
        ({"rotary_factor": 1.3}, "gives 10 of the 8"),
        ({"eos_id": 11}, "model.eos_id is 11"),
    ],
)
def test_config_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        MoonshineConfig(**{**plain.SIZES, "rotary_factor": 0.8, **changes})


def test_audio_too_short_for_a_frame(model):
    with pytest.raises(InputError, match="894 samples"):
        model.encode(jnp.zeros((1, 894)), jnp.array([894]))


def test_modules_name_what_is_wrong():
    with pytest.raises(InputError, match="width 8 is not a multiple of num_heads 3"):
        RotarySelfAttention(8, 3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="rotary_width is 5; it must be even"):
        RotarySelfAttention(16, 2, 5, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="width 8 is not a multiple of num_heads 3"):
        CrossAttention(8, 3, rngs=nnx.Rngs(0))


def test_a_row_without_frames_is_finite(model):
    audio, _ = speech()
    found = call(*nnx.split(model), audio, np.array([4000, 500]), TOKENS, np.array([5, 5]))
    assert found.lengths.tolist() == [9, 0]
    assert isinstance(model, Moonshine)
    assert np.isfinite(found.logits).all()
