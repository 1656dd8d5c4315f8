"""Models with exits as folders: bit for bit there and back, running statistics included."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.inference.long_audio import LongAudio
from edgespeech.inference.words import text_of, token_texts, words_of_path
from edgespeech.interop.ctc_model import open_ctc_model
from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.interop.tensors import named_variables
from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits
from edgespeech.nn.lpa import LPA, LPAConfig, harden
from edgespeech.ops.ctc import greedy_path
from tests.support.modules import randomize
from tests.support.tiny import tiny_model, tone
from tests.support.tiny_exits import exit_model


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "model", exit_model(), CharTokenizer(), {"steps": 3})
    return tmp_path / "model"


def test_round_trip_is_exact_with_running_statistics(folder):
    model = exit_model()
    found, tokenizer, about = load_pretrained(folder)
    assert found.config == model.config
    assert about == {"steps": 3}
    assert tokenizer.decode([3, 4]) == "AB"
    wanted, got = named_variables(model), named_variables(found)
    assert wanted.keys() == got.keys()
    assert "blocks.0.layers.0.conv.middle_norm.running_mean" in got
    for name, variable in wanted.items():
        np.testing.assert_array_equal(got[name][...], variable[...], err_msg=name)


@pytest.mark.parametrize("own_heads", [False, True])
def test_a_wav2vec2_with_exits(tmp_path, own_heads):
    encoder = randomize(tiny_model(num_layers=4))
    model = randomize(Wav2Vec2Exits(encoder, (1, 2, 4), own_heads=own_heads), seed=1)
    lpa = LPA.from_attention(encoder.layers[1].mixer, LPAConfig(), rngs=nnx.Rngs(0))
    encoder.layers[1].mixer = harden(lpa)
    save_pretrained(tmp_path / "model", model, CharTokenizer(), {})
    found, _, _ = open_ctc_model(tmp_path / "model")
    assert found.config == model.config
    assert isinstance(found.encoder.layers[1].mixer, LPA)
    assert found.blocks[1].layers[0] is found.encoder.layers[1]
    assert (found.heads[0].output is found.heads[2].output) == (not own_heads)
    wanted, got = named_variables(model), named_variables(found)
    assert wanted.keys() == got.keys()
    for name, variable in wanted.items():
        np.testing.assert_array_equal(got[name][...], variable[...], err_msg=name)
    # As the command line reads it: the last exit's words.
    audio = np.concatenate([tone("AB C"), tone("DE A")])
    output = jax.jit(lambda x, n: nnx.merge(*nnx.split(model))(x, n))(
        audio[None], np.array([len(audio)])
    )
    path = greedy_path(output.logits, output.lengths)[0]
    want = text_of(words_of_path(path, token_texts(CharTokenizer()), model.config.frame_seconds))
    assert LongAudio(found, CharTokenizer()).stream([audio]).text == want


def test_tensors_that_do_not_fit_are_named(folder):
    path = folder / "weights.safetensors"
    tensors = load_file(path)
    tensors["blocks.0.branch.layer.norm.scale"] = np.full(8, np.nan, np.float32)
    del tensors["heads.1.output.bias"]
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"norm.scale holds values.*heads.1.output.bias is miss"):
        load_pretrained(folder)
