"""Any model by its folder or hub id, with what belongs to it."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.interop.hf_layout import HEAD
from edgespeech.interop.hf_wav2vec2 import load_hf_wav2vec2
from edgespeech.interop.open_model import open_model
from edgespeech.interop.pretrained import save_pretrained
from tests.golden.hf_checkpoint import GOLDEN, IDS, TENSORS, without, write
from tests.support.tiny import assert_same_bits, tiny_model


def test_saved_here(tmp_path):
    model = tiny_model(seed=2)
    save_pretrained(tmp_path, model, CharTokenizer(), {"steps": 7})
    found, tokenizer, about = open_model(tmp_path)
    assert_same_bits(nnx.state(found, nnx.Param), nnx.state(model, nnx.Param))
    assert (tokenizer.vocab_size, about) == (29, {"steps": 7})


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_hugging_face_with_its_own_vocabulary(tmp_path, name):
    model, tokenizer, about = open_model(str(write(tmp_path) / name))
    audio = GOLDEN["audio"]
    logits = model(audio, np.full(len(audio), audio.shape[1])).logits
    np.testing.assert_allclose(logits, GOLDEN["logits"], rtol=0, atol=1e-5)
    assert tokenizer.encode("A CAT").tolist() == [IDS[t] for t in "A|CAT"]
    assert about == {"source": str(tmp_path / name), "notes": []}


def test_notes_are_handed_on(tmp_path):
    write(tmp_path, without("wav2vec2.masked_spec_embed"))
    (note,) = open_model(tmp_path)[2]["notes"]
    assert "masked_spec_embed" in note


def test_padding_is_the_models_own_unless_given(tmp_path):
    folders = {"hf": tmp_path / "hf", "ours": tmp_path / "ours"}
    folders["hf"].mkdir()
    write(folders["hf"])
    loaded = load_hf_wav2vec2(folders["hf"], "upstream")
    save_pretrained(folders["ours"], loaded.model, loaded.tokenizer, {})
    found = {
        (kind, given): open_model(folder, given)[0].config.padding
        for kind, folder in folders.items()
        for given in (None, "exact", "upstream")
    }
    assert found == {
        ("hf", None): "exact",
        ("hf", "exact"): "exact",
        ("hf", "upstream"): "upstream",
        ("ours", None): "upstream",
        ("ours", "exact"): "exact",
        ("ours", "upstream"): "upstream",
    }


def test_without_a_head(tmp_path):
    with pytest.raises(InputError, match=r"has no CTC head .*choose a fine-tuned checkpoint"):
        open_model(write(tmp_path, without(*HEAD)))


def test_half_a_head_is_a_fault(tmp_path):
    with pytest.raises(InputError, match=r"lm_head\.bias is missing"):
        open_model(write(tmp_path, without("lm_head.bias")))


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match=r"holds neither model\.json .* nor config\.json"):
        open_model(tmp_path)
    with pytest.raises(InputError, match=r"nowhere is missing: name a folder, .* or a hub id"):
        open_model(tmp_path / "nowhere")


def test_hub_id(tmp_path, monkeypatch):
    """A stand-in for the hub: one repository that it has, and no network for the others."""

    def snapshot_download(repo, allow_patterns):
        if repo != "some/base":
            raise ConnectionError("no network")
        return str(write(tmp_path))

    hub = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    model, tokenizer, about = open_model("some/base")
    np.testing.assert_array_equal(model.head.bias[...], TENSORS["lm_head.bias"])
    assert tokenizer.vocab_size == len(IDS)
    assert about["source"] == "some/base"
    with pytest.raises(InputError, match=r"some/other is not a local folder and cannot be had"):
        open_model("some/other")
