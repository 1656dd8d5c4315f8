"""Early-exit Conformers: published sizes, every exit under padding, the branch's identity, training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.models.splitformer import Splitformer, SplitformerConfig
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.ops.features import SpecAugmentConfig
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.tiny_exits import exit_audio, exit_config, exit_model

call = nnx.jit(lambda model, audio, lengths: model(audio, lengths))

# ---------------------------------------------------------------------------- published figures


@functools.cache
def abstract(preset, front_end):
    config = getattr(SplitformerConfig, preset)(front_end)
    return nnx.eval_shape(lambda: Splitformer(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("preset", "front_end", "parameters"),
    [
        ("ee_baseline", "paper", 31_536_128),
        ("splitformer", "fixed", 36_683_264),
    ],
)
def test_published_number_of_parameters(preset, front_end, parameters):
    model = abstract(preset, front_end)
    assert model.config.front_end == front_end
    assert count_parameters(model) == parameters


def test_published_number_of_parameters_with_a_branch_at_every_exit():
    config = SplitformerConfig.all_exits()
    assert [config.has_branch(m) for m in range(6)] == [True] * 6
    part = abstract(
        "splitformer", "fixed"
    )  # tracing eighteen layers takes longer than counting them
    front_end, block, head = map(count_parameters, (part.front_end, part.blocks[0], part.heads[0]))
    assert front_end + 6 * (block + head) == 46_977_536


@pytest.mark.parametrize(
    ("preset", "front_end", "millions"),
    [
        ("ee_baseline", "paper", (5.47, 10.62, 15.77, 20.91, 26.06, 31.21)),
        ("splitformer", "fixed", (8.05, 13.19, 18.34, 23.49, 28.63, 36.35)),
    ],
)
def test_published_parameters_up_to_each_exit(preset, front_end, millions):
    model = abstract(preset, front_end)
    front_end, head = count_parameters(model.front_end), count_parameters(model.heads[0])
    blocks = np.cumsum([count_parameters(block) for block in model.blocks])
    np.testing.assert_allclose((front_end + blocks + head) / 1e6, millions, atol=0.0051)


def test_tiny_has_both_front_ends():
    assert SplitformerConfig.tiny().front_end == "fixed"
    assert SplitformerConfig.tiny("paper").front_end == "paper"
    assert SplitformerConfig.tiny().num_frames(16_000) == 23
    assert SplitformerConfig.tiny("paper").num_frames(16_000) == 24
    assert SplitformerConfig.tiny().frame_seconds == 0.04


# -------------------------------------------------------------------------------- forward pass

OPTIONS = {
    "conv_norm": "group",
    "positions": "relative",
    "front_end": "fixed",
    "branches": "all",
    "downsample": "softmax",
    "combine": "bypass",
    "head": "bilstm",
}


@pytest.mark.parametrize("changes", [{}, OPTIONS], ids=["splitformer", "options"])
def test_every_exit_keeps_the_padding_contract(changes):
    model, (x, lengths) = exit_model(**changes), exit_audio()
    frames = model.config.num_frames

    def every_exit(x, lengths):
        out = call(model, x, lengths)
        return np.concatenate(out.exit_logits, axis=-1)

    # Alone: the shortest that the front end makes a frame of.
    shortest = 2 if changes else 3
    padding_contract(every_exit, x, lengths, rows=(shortest,), out_length=frames, atol=5e-5)
    np.testing.assert_array_equal(
        call(model, x, lengths).lengths, [frames(int(t)) for t in lengths]
    )


def test_blocks_and_heads_make_the_output():
    model, (x, lengths) = exit_model(), exit_audio()
    out = call(model, x, lengths)
    np.testing.assert_array_equal(out.logits, out.exit_logits[-1])

    @nnx.jit
    def parts(model, x, lengths):
        h, frames = model.embed(x, lengths)
        hidden = []
        for block in model.blocks:
            h = block(h, frames)
            hidden.append(h)
        heads = zip(model.heads, hidden, strict=True)
        return h, hidden, [head(h, frames) for head, h in heads]

    _, hidden, logits = parts(model, x, lengths)
    for got, want in zip((*out.hidden, *out.exit_logits), (*hidden, *logits), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_branch_with_its_last_norm_at_zero_is_the_baseline():
    model, (x, lengths) = exit_model(layers_per_exit=2), exit_audio()
    baseline = Splitformer(dataclasses.replace(model.config, branches="none"), rngs=nnx.Rngs(1))
    flat = nnx.to_flat_state(nnx.state(model))
    shared = [(path, leaf) for path, leaf in flat if "branch" not in path]
    nnx.update(baseline, nnx.from_flat_state(shared))
    want = call(baseline, x, lengths)
    assert np.abs(call(model, x, lengths).logits - want.logits).max() > 0.01
    for index in (0, 2):
        norm = model.blocks[index].branch.layer.norm
        norm.scale[...] *= 0.0
        norm.bias[...] *= 0.0
    assert model.blocks[1].branch is None
    for got, exit in zip(call(model, x, lengths).exit_logits, want.exit_logits, strict=True):
        np.testing.assert_array_equal(got, exit)


def test_audio_too_short_for_a_frame_is_refused():
    with pytest.raises(InputError, match="959 samples"):
        exit_model()(jnp.zeros((1, 959)), jnp.array([959]))


# ------------------------------------------------------------------------------------ training


def test_training_ignores_padding_and_an_utterance_without_frames():
    model, (x, lengths) = exit_model(num_exits=2), exit_audio((2880, 1600, 100))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    valid = np.arange(x.shape[1]) < lengths[:, None]

    @jax.jit
    def gradient(x):
        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            out = model(x, lengths, jax.random.key(0))
            mask = jnp.arange(out.logits.shape[1]) < out.lengths[:, None]
            total = sum(jnp.sum(jnp.where(mask[..., None], z, 0.0) ** 2) for z in out.exit_logits)
            return total, nnx.state(model, nnx.BatchStat)

        return jax.grad(loss, has_aux=True)(params)

    want, got = gradient(x), gradient(np.where(valid, x, np.float32(np.nan)))
    for a, b in zip(want, got, strict=True):
        a, b = reference.parameters_of_state(a), reference.parameters_of_state(b)
        for name, value in a.items():
            assert np.isfinite(value).all(), name
            np.testing.assert_array_equal(b[name], value, err_msg=name)
    gradients = reference.parameters_of_state(want[0])
    assert sum(np.any(value != 0) for value in gradients.values()) > 0.9 * len(gradients)
    before = reference.parameters_of_state(nnx.state(model, nnx.BatchStat))
    for name, value in reference.parameters_of_state(want[1]).items():
        assert np.any(value != before[name]), name


def test_key_means_training():
    short = SpecAugmentConfig(frequency_width=4, time_mask_rate=0.3, time_width=4)
    sizes = {"front_end": "fixed", "spec_augment": short, "conv_norm": "layer", "num_exits": 1}
    model, (x, lengths) = exit_model(**sizes), exit_audio((3520, 2880))
    train = nnx.jit(lambda model, key: model(x, lengths, key).logits)
    masked = train(model, jax.random.key(0))
    np.testing.assert_array_equal(masked, train(model, jax.random.key(0)))
    assert np.abs(masked - call(model, x, lengths).logits).max() > 1e-2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("num_exits", 0),
        ("layers_per_exit", -1),
        ("num_mels", 0),
        ("num_heads", 3),
        ("width", 9),
        ("conv_kernel", 4),
        ("conv_norm", "instance"),
        ("positions", "rotary"),
        ("front_end", "mfcc"),
        ("branches", "some"),
        ("downsample", "max"),
        ("combine", "gate"),
        ("head", "gru"),
        ("dropout", 1.0),
    ],
)
def test_config_names_what_is_wrong(field, value):
    changes = {field: value} | ({"num_heads": 1} if field == "width" else {})
    with pytest.raises(InputError, match=rf"model\.{field} is {value!r}"):
        exit_config(**changes)
