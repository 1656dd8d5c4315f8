"""A CTC head on Moonshine's encoder: sizes, a float64 forward pass, padding, time masks, where weights come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.interop.tensors import copy_but_head, named_params
from edgespeech.models.moonshine_ctc import MoonshineCTC, MoonshineCTCConfig, encoder_of
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.nn.lpa import LPA, LPAConfig, harden
from edgespeech.ops.features import SpecAugmentConfig
from tests.support import moonshine as plain
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.modules import randomize
from tests.support.moonshine import speech, tiny_moonshine

SIZES = {
    "vocab_size": 29,
    "head_width": 12,
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_width": 24,
}
run = jax.jit(lambda g, s, *inputs: nnx.merge(g, s)(*inputs), static_argnums=0)


def tiny(**changes) -> MoonshineCTC:
    config = MoonshineCTCConfig(**{**SIZES, "rotary_factor": 0.8, **changes})
    return randomize(MoonshineCTC(config, rngs=nnx.Rngs(0)), 0, 0.1)


def plain_head(weights, x):
    y = np.pad(x, ((2, 2), (0, 0)))
    y = reference.conv(y, weights["head.kernel"], 1) + weights["head.bias"]
    return reference.linear(reference.part(weights, "head.output"), reference.gelu(y))


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.mark.parametrize(("preset", "count"), [("base", 21_235_008), ("tiny", 8_435_456)])
def test_number_of_parameters(preset, count):
    config = getattr(MoonshineCTCConfig, preset)()
    sketch = nnx.eval_shape(lambda: MoonshineCTC(config, rngs=nnx.Rngs(0)))
    assert count_parameters(sketch) == count


def test_equals_a_plain_forward_pass_in_float64(model):
    audio, lengths = speech()
    output = run(*nnx.split(model), audio, lengths)
    weights = reference.parameters(model)
    for row, length in enumerate(lengths):
        x = plain.front_end(reference.part(weights, "front_end"), np.float64(audio[row, :length]))
        for i in range(2):
            layer = reference.part(weights, f"layers.{i}")
            y = plain.norm(reference.part(layer, "mixer_norm"), x)
            mask = np.ones((len(x), len(x)), bool)
            x = x + plain.attention(reference.part(layer, "mixer"), y, y, 2, 6, mask)
            y = plain.norm(reference.part(layer, "ffn_norm"), x)
            x = x + reference.feed_forward(reference.part(layer, "ffn"), y)
            np.testing.assert_allclose(output.hidden[i][row, : len(x)], x, atol=2e-5)
            logits = plain_head(weights, plain.norm(reference.part(weights, "norm"), x))
            found = model.logits(output.hidden[i], output.lengths)[row, : len(x)]
            np.testing.assert_allclose(found, logits, atol=2e-5)
        assert output.lengths[row] == len(x) == model.config.num_frames(int(length))
        np.testing.assert_allclose(output.logits[row, : len(x)], logits, atol=2e-5)


def test_padding_changes_nothing(model):
    graphdef, state = nnx.split(model)
    audio, lengths = speech()
    padding_contract(
        lambda x, n: run(graphdef, state, jnp.asarray(x), jnp.asarray(n)).logits,
        audio,
        lengths,
        out_length=model.config.num_frames,
    )


def test_time_masks_in_training_alone(model):
    """With a mask that covers what it may, masked frames enter the layers as zeros and the others as they are."""
    masks = SpecAugmentConfig(time_mask_rate=0.5, time_width=4)
    masked = tiny(spec_augment=masks)
    seen = {}

    class Watch(nnx.Module):
        def __call__(self, x, lengths):
            seen["x"] = x
            return jnp.zeros_like(x)

    masked.layers[0].mixer = Watch()
    audio, lengths = speech()
    audio, lengths = jnp.asarray(audio), jnp.asarray(lengths)
    frames, n = masked.embed(audio, lengths)
    want = masked.layers[0].mixer_norm(frames)
    masked(audio, lengths)
    np.testing.assert_array_equal(seen["x"], want)
    masked(audio, lengths, jax.random.key(3))
    valid = np.arange(frames.shape[1]) < np.asarray(n)[:, None]
    is_zero = (np.asarray(seen["x"]) == 0).all(-1) & valid
    assert 0 < is_zero.sum() < valid.sum()
    kept = valid & ~is_zero
    np.testing.assert_array_equal(np.asarray(seen["x"])[kept], np.asarray(want)[kept])


def test_encoder_of_a_moonshine():
    """Frames are those of the Moonshine, mixers included, and its arrays stay its own."""
    moonshine = tiny_moonshine()
    config = LPAConfig(aperiodic=2, periodic=1, positional=1)
    attention = moonshine.layers[1].mixer
    moonshine.layers[1].mixer = LPA.from_attention(attention, config, rngs=nnx.Rngs(1))
    model = encoder_of(moonshine, rngs=nnx.Rngs(2), vocab_size=29)
    audio, lengths = map(jnp.asarray, speech())
    harden(model)
    harden(moonshine)
    wanted = moonshine.encode(audio, lengths)
    found = model.encode(audio, lengths)
    np.testing.assert_array_equal(found.memory, wanted.memory)
    np.testing.assert_array_equal(
        model(audio, lengths).logits, model.head(wanted.memory, wanted.lengths)
    )
    model.norm.scale[...] = model.norm.scale[...] + 1
    np.testing.assert_array_equal(moonshine.encode(audio, lengths).memory, wanted.memory)


def test_copies_into_a_model_of_another_vocabulary():
    start = encoder_of(tiny_moonshine(), rngs=nnx.Rngs(0))
    model = tiny(head_width=20)
    head = np.asarray(model.head.kernel[...])
    copy_but_head(model, start, "start")
    np.testing.assert_array_equal(model.head.kernel[...], head)
    wanted = named_params(start)
    for name, param in named_params(model).items():
        if not name.startswith("head."):
            np.testing.assert_array_equal(param[...], wanted[name][...])


def test_saved_and_opened(tmp_path):
    model = tiny(vocab_size=CharTokenizer().vocab_size)
    model.layers[0].mixer = LPA.from_attention(
        model.layers[0].mixer, LPAConfig.default(), rngs=nnx.Rngs(1)
    )
    harden(model)
    save_pretrained(tmp_path, model, CharTokenizer(), {"data": "none"})
    found, tokenizer, about = load_pretrained(tmp_path)
    assert type(found) is MoonshineCTC
    assert found.config == model.config
    assert about == {"data": "none"}
    assert tokenizer.vocab_size == model.config.vocab_size
    audio, lengths = map(jnp.asarray, speech())
    np.testing.assert_array_equal(found(audio, lengths).logits, model(audio, lengths).logits)


def test_config_out_of_range():
    with pytest.raises(InputError, match=r"model\.vocab_size is 0"):
        MoonshineCTCConfig(vocab_size=0)
    with pytest.raises(InputError, match=r"model\.num_heads is 5"):
        MoonshineCTCConfig(num_heads=5)
    with pytest.raises(InputError, match=r"model\.head_kernel is 4"):
        MoonshineCTCConfig(head_kernel=4)


def test_audio_too_short_for_a_frame(model):
    with pytest.raises(InputError, match="894 samples"):
        model(jnp.zeros((1, 894)), jnp.array([894]))
