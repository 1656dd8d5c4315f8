"""Saved Moonshines: what is loaded is what was saved, for every mixer; and what a command line may name."""

import json

import numpy as np
import pytest
from flax import nnx

from edgespeech.conversion.mixers import control_factory, lpa_factory
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.interop.hf_moonshine import save_hf_moonshine
from edgespeech.interop.moonshine_tokenizer import PieceTokenizer, load_piece_tokenizer
from edgespeech.interop.open_model import open_model
from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.nn.lpa import LPA, LPAConfig, set_anneal
from edgespeech.nn.rotary import RotarySelfAttention
from edgespeech.nn.token_mixer_controls import Removed, RotarySlidingWindowAttention
from tests.support.moonshine import call, speech, tiny_moonshine
from tests.support.moonshine_conversion import letters
from tests.support.tiny import assert_same_bits, tiny_model

SMALL_LPA = LPAConfig(aperiodic=2, periodic=1, positional=1, kernel_size=3, local_kernel_size=3)


def make_hybrid():
    """One mixer of every kind."""
    model = tiny_moonshine(seed=4, num_layers=4)
    factories = (
        lpa_factory(SMALL_LPA),
        control_factory("sliding_window", window=2),
        control_factory("removed", window=2),
    )
    for layer, factory in zip(model.layers, factories, strict=False):
        layer.mixer = factory(layer.mixer, nnx.Rngs(1))
    set_anneal(model, 1.0, 1.0)
    return model


def logits(model):
    audio, lengths = speech()
    tokens = np.asarray([[1, 4, 5], [1, 3, 0]])
    return call(*nnx.split(model), audio, lengths, tokens, np.asarray([3, 2])).logits


def test_round_trip(tmp_path):
    model = make_hybrid()
    save_pretrained(tmp_path / "model", model, letters(), {"replaced": [1]})
    loaded, tokenizer, about = open_model(tmp_path / "model", "exact")
    assert loaded.config == model.config
    kinds = [type(layer.mixer) for layer in loaded.layers]
    assert kinds == [LPA, RotarySlidingWindowAttention, Removed, RotarySelfAttention]
    assert loaded.layers[1].mixer.window == 2
    assert_same_bits(nnx.state(loaded, nnx.Param), nnx.state(model, nnx.Param))
    np.testing.assert_allclose(logits(loaded), logits(model), atol=1e-5)
    assert (tokenizer.pieces, tokenizer.vocab_size) == (letters().pieces, 11)
    assert about == {"replaced": [1]}
    assert json.loads((tmp_path / "model" / "model.json").read_text())["family"] == "moonshine"


def test_upstream_padding_is_not_to_be_had(tmp_path):
    save_pretrained(tmp_path, tiny_moonshine(), letters(), {})
    with pytest.raises(InputError, match=r"is a Moonshine, which has 'exact' alone: leave it out"):
        open_model(tmp_path, "upstream")


def test_a_checkpoint_of_hugging_face(tmp_path):
    model = tiny_moonshine(seed=6)
    save_hf_moonshine(tmp_path, model)
    with pytest.raises(InputError, match=r"tokenizer.json is missing: take it from where"):
        open_model(tmp_path)
    vocabulary = {"<unk>": 0, **{chr(65 + i): i for i in range(1, 11)}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    found, tokenizer, about = open_model(tmp_path / "model.safetensors")
    np.testing.assert_allclose(logits(found), logits(model), atol=1e-5)
    assert tokenizer.decode([1, 2]) == "BC"
    assert about == {"source": str(tmp_path / "model.safetensors"), "notes": []}


def test_a_ctc_model_has_its_own_tokenizer(tmp_path):
    save_pretrained(tmp_path, tiny_model(), CharTokenizer(), {})
    letters().save(tmp_path)
    with pytest.raises(InputError, match=r"names the kind 'pieces'"):
        load_pretrained(tmp_path)


# --- the tokenizer's other direction

BYTES = [bytes([b]) for b in range(256)]
MERGES = ["he", "ll", "▁he", "llo", "▁hello", "lo"]
PIECES = [None, *BYTES, *(m.encode() for m in MERGES), *(c.encode() for c in "▁helo")]


def test_encode_merges_what_was_learned_first():
    tokenizer = PieceTokenizer(PIECES, len(PIECES))
    spelled = [tokenizer.pieces[i].decode() for i in tokenizer.encode("hello lo  llolo")]
    assert spelled == ["▁hello", "▁", "lo", "▁", "llo", "lo"]
    # é has no piece: its two bytes do.
    ids = tokenizer.encode("hé")
    assert [tokenizer.pieces[i] for i in ids[1:]] == [b"h", b"\xc3", b"\xa9"]
    assert ids[1] == PIECES.index(b"h", 200)  # the character and not the byte
    for text in ("hello lo llolo", "hé ♥ <x>"):
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert tokenizer.encode("").tolist() == []
    assert letters().can_encode("A B!é") == {"A", " ", "B", "!", "é"}
    with pytest.raises(InputError, match=r"the vocabulary lacks \['!'\]; take them out"):
        PieceTokenizer(["▁".encode(), b"a"], 2).encode("a!")


def test_pieces_survive_a_file(tmp_path):
    PieceTokenizer(PIECES, 300).save(tmp_path)
    loaded = load_piece_tokenizer(tmp_path)
    assert (loaded.pieces, loaded.vocab_size) == (tuple(PIECES), 300)
    (tmp_path / "tokenizer.json").write_text('{"pieces": [3], "vocab_size": 5}')
    with pytest.raises(InputError, match=r"tokenizer.json is damaged"):
        load_piece_tokenizer(tmp_path)
