"""Capture: what the mixers of a model see, against calling its parts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.conversion.capture import capture, capture_gates
from edgespeech.conversion.layers import mixer_layers
from edgespeech.errors import InputError
from edgespeech.nn.lpa import LPA
from edgespeech.nn.lpa_config import LPAConfig
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from tests.support.modules import randomize
from tests.support.tiny import assert_same_bits, batch_with_filler, tiny_model, tone_source


class Scale(nnx.Module):
    """A toy mixer."""

    def __init__(self, factor):
        self.factor = nnx.Param(jnp.asarray(factor))

    def __call__(self, x, lengths):
        del lengths
        return x * self.factor[...]


class Block(nnx.Module):
    def __init__(self, factor):
        self.mixer = nnx.data(Scale(factor))

    def __call__(self, x, lengths):
        return x + self.mixer(x, lengths)


class Toy(nnx.Module):
    """Three blocks, called last to first, the middle one twice; no Wav2Vec2 anywhere."""

    def __init__(self, fail=False):
        self.blocks = nnx.List([Block(1.0), Block(2.0), Block(3.0)])
        self.fail = fail

    def __call__(self, x, lengths):
        x = self.blocks[2](x, lengths)
        if self.fail:
            raise RuntimeError("in the middle")
        for index in (1, 1, 0):
            x = self.blocks[index](x, lengths)
        return x


@pytest.mark.parametrize("norm_first", [True, False])
def test_equals_the_mixers_called_by_hand(norm_first):
    model = tiny_model(norm_first=norm_first)
    batch = batch_with_filler(tone_source())
    plain = model(batch.audio, batch.audio_lengths)
    output, calls = capture(model, batch.audio, batch.audio_lengths)
    assert_same_bits(output, plain)
    assert len(calls) == 3

    x, lengths = model.front_end(jnp.asarray(batch.audio), batch.audio_lengths)
    x = model.projection(model.projection_norm(x))
    x = zero_padding(x, mask_from_lengths(lengths, x.shape[1]))
    x = x + model.positions(x, lengths)
    x = x if norm_first else model.norm(x)
    for layer, call in zip(model.layers, calls, strict=True):
        seen = layer.mixer_norm(x) if norm_first else x
        y = layer.mixer(seen, lengths)
        np.testing.assert_array_equal(call.lengths, lengths)
        np.testing.assert_allclose(call.x, seen, rtol=0, atol=1e-6)
        np.testing.assert_allclose(call.y, y, rtol=0, atol=1e-6)
        x = layer(x, lengths)


def test_the_model_is_as_before():
    model = tiny_model()
    mixers = [layer.mixer for layer in model.layers]
    graphdef, state = nnx.split(model)
    batch = tone_source().batch(0)
    capture(model, batch.audio, batch.audio_lengths)
    assert [layer.mixer for layer in model.layers] == mixers
    after_graphdef, after = nnx.split(model)
    assert after_graphdef == graphdef
    assert_same_bits(after, state)


def test_any_model_whose_layers_have_a_mixer_in_the_order_of_the_calls():
    x, lengths = jnp.ones((1, 2, 3)), jnp.asarray([2])
    output, calls = capture(Toy(), x, lengths)
    # x (1 + 3), then twice (1 + 2), then (1 + 1)
    np.testing.assert_allclose(output, 72.0)
    assert [float(call.x[0, 0, 0]) for call in calls] == [1, 4, 12, 36]
    assert [float(call.y[0, 0, 0]) for call in calls] == [3, 8, 24, 36]


def test_the_model_is_as_before_after_an_error():
    model = Toy(fail=True)
    mixers = [block.mixer for block in model.blocks]
    with pytest.raises(RuntimeError, match="in the middle"):
        capture(model, jnp.ones((1, 2, 3)), jnp.asarray([2]))
    assert [block.mixer for block in model.blocks] == mixers
    assert all(isinstance(mixer, Scale) for mixer in mixers)


def test_works_inside_jit():
    graphdef, state = nnx.split(Toy())

    @jax.jit
    def run(state, x):
        _, calls = capture(nnx.merge(graphdef, state), x, jnp.asarray([2]))
        return [call.y for call in calls]

    ys = run(state, jnp.ones((1, 2, 3)))
    assert [float(y[0, 0, 0]) for y in ys] == [3, 8, 24, 36]


def test_gates_are_those_of_each_layers_own_input():
    """The layers are called last to first, so the order of the calls is not that of the layers."""
    model = Toy()
    config = LPAConfig(aperiodic=2, runs=1, periodic=1, positional=1)
    for index in (0, 2):
        model.blocks[index].mixer = randomize(LPA(8, 2, config, rngs=nnx.Rngs(index)), index)
    first, last = model.blocks[0].mixer, model.blocks[2].mixer
    lengths = jnp.asarray([6, 4])
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    output, gates = capture_gates(model, x, lengths)

    assert_same_bits(output, model(x, lengths))
    assert set(gates) == {("blocks", 0), ("blocks", 2)}  # the block between them has no pulses
    y = x + last(x, lengths)
    seen = {
        ("blocks", 2): (last, x),
        ("blocks", 0): (first, y * 9),
    }  # the one between triples, twice
    for path, (lpa, inputs) in seen.items():
        expected = lpa.gates(inputs, lengths)
        assert gates[path].kinds.keys() == expected.keys()
        for kind, gate in expected.items():
            np.testing.assert_allclose(gates[path].kinds[kind], gate, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(gates[path].lengths, lengths)


def test_layers_come_in_numeric_order():
    model = tiny_model(num_layers=12, width=16)
    assert list(mixer_layers(model)) == [("layers", index) for index in range(12)]


def test_a_model_without_mixers():
    with pytest.raises(InputError, match="Linear has no layer with an attribute `mixer`"):
        mixer_layers(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
