"""Exits of a wav2vec2 encoder: each is the encoder cut short, and leaving early is what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.inference.early_exit import EarlyExit, SingleProgramEarlyExit
from edgespeech.inference.exit_policy import ExitPolicy
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config, count_parameters
from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits, Wav2Vec2ExitsConfig
from edgespeech.training.ctc import ctc_objective
from edgespeech.training.exits import ExitLossConfig, exit_objective
from tests.support.modules import randomize
from tests.support.tiny import tiny_model, tone_source

EXITS = (1, 3)


def encoder(**changes):
    return randomize(tiny_model(num_layers=3, **changes), 0, 0.3)


def speech(samples=(9000, 5200, 7000)):
    x = 0.1 * np.random.default_rng(1).normal(size=(len(samples), max(samples)))
    return jnp.asarray(x, jnp.float32), jnp.asarray(samples)


def cut(model: Wav2Vec2, layers: int) -> Wav2Vec2:
    """The encoder with its first layers alone."""
    short = nnx.clone(model)
    short.layers = nnx.List(short.layers[:layers])
    return short


@pytest.mark.parametrize("norm_first", [True, False])
def test_every_exit_is_the_encoder_cut_short(norm_first):
    model = encoder(norm_first=norm_first)
    out = Wav2Vec2Exits(model, EXITS)(*speech())
    for layer, logits, hidden in zip(EXITS, out.exit_logits, out.hidden, strict=True):
        want = cut(model, layer)(*speech())
        for row, n in enumerate(np.asarray(want.lengths)):
            np.testing.assert_allclose(logits[row, :n], want.logits[row, :n], atol=1e-5)
            np.testing.assert_allclose(hidden[row, :n], want.hidden[-1][row, :n], atol=1e-5)
    np.testing.assert_array_equal(out.lengths, model(*speech()).lengths)


def test_the_last_layer_is_always_an_exit():
    assert Wav2Vec2Exits(encoder(), (2,)).config.exits == (2, 3)


@pytest.mark.parametrize("program", [EarlyExit, SingleProgramEarlyExit])
def test_leaving_early_gives_the_transcript_of_that_exit(program):
    exits = Wav2Vec2Exits(encoder(), EXITS)
    audio, lengths = speech()
    logits = exits(audio, lengths).exit_logits
    frames = np.asarray(exits(audio, lengths).lengths)
    for threshold, exit in ((np.inf, 0), (-np.inf, 1)):
        run = program(exits, ExitPolicy("entropy", threshold))
        rows = [slice(0, 3)] if program is EarlyExit else [slice(r, r + 1) for r in range(3)]
        tokens = [t for r in rows for t in run(audio[r], lengths[r]).tokens]
        for row, n in enumerate(frames):
            path = np.asarray(jnp.argmax(logits[exit][row, :n], -1))
            merged = path[np.insert(path[1:] != path[:-1], 0, True)]
            np.testing.assert_array_equal(tokens[row], merged[merged != 0])


def test_shared_heads_add_no_parameter_and_own_ones_a_linear_layer_each():
    model = encoder()
    assert count_parameters(Wav2Vec2Exits(model, EXITS)) == count_parameters(model)
    own = Wav2Vec2Exits(model, (1, 2, 3), own_heads=True)
    head = count_parameters(model.head)
    assert count_parameters(own) == count_parameters(model) + 2 * head


def test_own_heads_are_trained_apart():
    exits = Wav2Vec2Exits(encoder(dropout=0.0), EXITS, own_heads=True)
    graphdef, params, statistics = nnx.split(exits, nnx.Param, nnx.BatchStat)
    loss = exit_objective(graphdef, ExitLossConfig(weights=(1.0, 0.0)))
    batch = tone_source().batch(0)

    def value(params):
        return loss(params, batch, None, 0, statistics)[0]

    gradient = jax.jit(jax.grad(value))(params)
    # Only the first exit is in the loss: its head and layer move, what lies behind it does not.
    sizes = {
        ".".join(map(str, path)): float(jnp.abs(leaf[...]).max())
        for path, leaf in nnx.to_flat_state(gradient)
    }
    assert sizes["heads.0.output.kernel"] > 1e-4
    assert max(size for name, size in sizes.items() if name.startswith("encoder.head")) == 0
    assert max(size for name, size in sizes.items() if name.startswith("blocks.1.")) == 0
    assert max(size for name, size in sizes.items() if name.startswith("blocks.0.")) > 1e-4


def test_shared_heads_are_intermediate_ctc():
    """The loss of exits of equal weight is that of a CTC teacher with the same intermediate layers."""
    model = encoder(dropout=0.0)
    batch = tone_source().batch(0)
    graphdef, params, statistics = nnx.split(Wav2Vec2Exits(model, EXITS), nnx.Param, nnx.BatchStat)
    found, _, _ = exit_objective(graphdef, ExitLossConfig())(params, batch, None, 0, statistics)
    teacher, params = nnx.split(model)
    _, terms = ctc_objective(teacher, (1,))(params, batch, None, 0)
    assert float(found) == pytest.approx(float(terms["ctc"] + terms["ctc_intermediate"]), rel=1e-5)


def test_exits_after_every_so_many_layers():
    base = Wav2Vec2ExitsConfig.evenly(Wav2Vec2Config.base(), 6, own_heads=True)
    assert base.exits == base.exit_layers == (2, 4, 6, 8, 10, 12)
    assert (base.vocab_size, base.width, base.frame_seconds) == (32, 768, 0.02)
    assert base.num_frames(16_000) == 49
    made = Wav2Vec2Exits.create(
        Wav2Vec2ExitsConfig.evenly(encoder().config, 3, own_heads=True), rngs=nnx.Rngs(0)
    )
    assert made.config.exits == (1, 2, 3)
    assert len({id(head.output) for head in made.heads}) == 3
    with pytest.raises(InputError, match="12 layers cannot be parted into 5 equal groups"):
        Wav2Vec2ExitsConfig.evenly(Wav2Vec2Config.base(), 5)
    with pytest.raises(InputError, match=r"exits are \(\)"):
        Wav2Vec2ExitsConfig(Wav2Vec2Config.base(), ())


@pytest.mark.parametrize("exits", [(0, 3), (2, 1, 3), (1, 1, 3), (1, 4)])
def test_exits_that_are_not_there(exits):
    with pytest.raises(InputError, match="give ascending layers of the encoder, from 1 to 3"):
        Wav2Vec2Exits(encoder(), exits)


def test_upstream_padding_is_refused():
    model = tiny_model(front_end="waveform", norm_first=False, position_groups=4)
    model.config = model.config.__class__(**{**vars(model.config), "padding": "upstream"})
    with pytest.raises(InputError, match="asks for 'exact'"):
        Wav2Vec2Exits(model, (1,))
