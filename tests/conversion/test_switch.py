"""Switches: one program that equals every assignment of mixers."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from edgespeech.conversion.layers import mixer_layers
from edgespeech.conversion.mixers import lpa_factory
from edgespeech.conversion.sweep import make_replacements
from edgespeech.conversion.switch import Switch, finalise, install_switches
from edgespeech.nn.lpa import LPA, LPAConfig
from tests.support.tiny import assert_same_bits, batch_with_filler, tiny_model, tone_source

SMALL_LPA = LPAConfig(aperiodic=2, periodic=1, positional=1, kernel_size=3, local_kernel_size=3)
SUBSETS = [s for size in range(4) for s in itertools.combinations(range(3), size)]


@pytest.fixture(scope="module")
def case():
    """A model, replacements for its mixers, and a batch with filler."""
    model = tiny_model()
    replacements = make_replacements(model, lpa_factory(SMALL_LPA), seed=3)
    return model, replacements, batch_with_filler(tone_source())


def switched(model, replacements):
    model = nnx.clone(model)
    install_switches(model, replacements)
    return model


def set_active(model, subset):
    for index, layer in enumerate(mixer_layers(model).values()):
        layer.mixer.active[...] = index in subset


def assigned(model, replacements, subset):
    model = nnx.clone(model)
    for index in subset:
        model.layers[index].mixer = replacements[index]
    return model


def outputs(model, batch):
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state):
        output = nnx.merge(graphdef, state)(batch.audio, batch.audio_lengths)
        return output.logits, output.hidden

    return run(state)


@pytest.mark.parametrize("active", [False, True])
def test_a_switch_is_its_mixer_bit_for_bit(case, active):
    model, replacements, _ = case
    attention = model.layers[0].mixer
    switch = Switch(attention, replacements[0])
    assert not switch.active[...]
    switch.active[...] = active
    x = np.random.default_rng(0).normal(size=(2, 9, 16)).astype(np.float32)
    lengths = np.asarray([9, 5])
    expected = jax.jit((replacements[0] if active else attention).__call__)(x, lengths)
    assert_same_bits(jax.jit(switch.__call__)(x, lengths), expected)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("subset", SUBSETS)
def test_any_subset_equals_the_assignment(case, subset, scan):
    model, replacements, batch = case
    student = switched(model, replacements)
    student.scan_layers = scan
    set_active(student, subset)
    found = outputs(student, batch)
    expected = outputs(assigned(model, replacements, subset), batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), found, expected)


@pytest.mark.parametrize("subset", SUBSETS)
def test_finalise_is_the_assignment(case, subset):
    model, replacements, _ = case
    student = switched(model, replacements)
    attentions = [layer.mixer.attention for layer in student.layers]
    finalise(student, subset)
    for index, layer in enumerate(student.layers):
        chosen = replacements if index in subset else attentions
        assert layer.mixer is chosen[index]
        assert isinstance(layer.mixer, LPA) == (index in subset)
    expected_graphdef, expected = nnx.split(assigned(model, replacements, subset))
    graphdef, state = nnx.split(student)
    assert graphdef == expected_graphdef
    assert_same_bits(state, expected)


def test_one_replacement_for_every_layer(case):
    model, replacements, _ = case
    with pytest.raises(ValueError, match="shorter"):
        install_switches(nnx.clone(model), replacements[:2])
