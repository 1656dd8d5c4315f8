"""Saved SepFormers: teachers and hybrids estimate what they did before, and have no tokenizer."""

import numpy as np
import pytest
from flax import nnx

from edgespeech.conversion.enhancement_task import (
    seal_inter_chunk_layers,
    unseal_inter_chunk_layers,
)
from edgespeech.conversion.layers import mixer_layers
from edgespeech.conversion.mixers import lpa_factory
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.models.sepformer import SepFormer
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA, LPAConfig, harden
from tests.support.modules import randomize
from tests.support.sepformer import TOY
from tests.support.tiny import assert_same_bits

LPA_CONFIG = LPAConfig(aperiodic=2, periodic=1, positional=1, kernel_size=3, local_kernel_size=3)


def make_teacher():
    return randomize(SepFormer(TOY, rngs=nnx.Rngs(0)), 0, 0.3)


def make_hybrid():
    """As a conversion leaves it: LPA in the second and third intra-chunk layer."""
    sealed = seal_inter_chunk_layers(make_teacher())
    layers = list(mixer_layers(sealed).values())
    for seed, layer in enumerate(layers[1:3]):
        layer.mixer = lpa_factory(LPA_CONFIG)(layer.mixer, nnx.Rngs(seed))
    return unseal_inter_chunk_layers(harden(sealed))


@pytest.mark.parametrize("make", [make_teacher, make_hybrid])
def test_round_trip(tmp_path, make):
    model = make()
    save_pretrained(tmp_path, model, None, {"steps": 2})
    loaded, tokenizer, about = load_pretrained(tmp_path)
    assert isinstance(loaded, SepFormer)
    assert (tokenizer, about) == (None, {"steps": 2})
    assert loaded.config == TOY
    assert_same_bits(nnx.state(loaded, nnx.Param), nnx.state(model, nnx.Param))
    audio = 0.1 * np.random.default_rng(0).normal(size=(2, 3000)).astype(np.float32)
    lengths = np.array([3000, 2100])
    found, wanted = loaded(audio, lengths).estimates, model(audio, lengths).estimates
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_the_saved_hybrid_has_its_layers_in_place_and_attention_across_chunks(tmp_path):
    save_pretrained(tmp_path, make_hybrid(), None, {})
    loaded, _, _ = load_pretrained(tmp_path)
    assert isinstance(loaded, SepFormer)
    kinds = [
        [type(layer.mixer) for layer in path.layers]
        for block in loaded.mask_network.blocks
        for path in (block.intra, block.inter)
    ]
    attention = SelfAttention
    assert kinds == [[attention, LPA], [attention], [LPA, attention], [attention]]


def test_unsealing_gives_the_model_back():
    teacher = make_teacher()
    again = unseal_inter_chunk_layers(seal_inter_chunk_layers(teacher))
    assert mixer_layers(again).keys() == mixer_layers(teacher).keys()
    assert_same_bits(nnx.state(again, nnx.Param), nnx.state(teacher, nnx.Param))


def test_a_tokenizer_belongs_to_models_that_write_text_alone(tmp_path):
    with pytest.raises(TypeError, match="family 'sepformer' was given the tokenizer"):
        save_pretrained(tmp_path, make_teacher(), CharTokenizer(), {})
    assert not list(tmp_path.iterdir())
