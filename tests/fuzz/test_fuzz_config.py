"""Damaged configurations: the model that a saved folder describes, or a message; never memory for what it cannot be."""

import dataclasses
import json

import pytest
from flax import nnx
from hypothesis import given

from edgespeech.conversion.mixers import lpa_factory
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.interop.hf_wav2vec2 import load_hf_wav2vec2
from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.models.edge_conformer_config import EdgeConformerConfig
from edgespeech.nn.lpa import LPAConfig
from tests.fuzz.damage import damaged_json, fuzz, read_or_refuse
from tests.golden import hf_checkpoint
from tests.support.tiny import tiny_model
from tests.support.tiny_exits import exit_model

LPA = LPAConfig(aperiodic=1, runs=1, periodic=1, positional=1, kernel_size=3, local_kernel_size=3)


def hybrid():
    model = tiny_model(num_layers=2)
    model.layers[1].mixer = lpa_factory(LPA)(model.layers[1].mixer, nnx.Rngs(0))
    return model


def edge_conformer():
    sizes = {"width": 8, "num_layers": 1, "num_heads": 2, "ffn_width": 8, "num_mels": 11}
    config = dataclasses.replace(EdgeConformerConfig.tiny(), vocab_size=29, **sizes)
    return EdgeConformer(config, rngs=nnx.Rngs(0))


MODELS = {
    "wav2vec2": hybrid,
    "edge_conformer": edge_conformer,
    "splitformer": lambda: exit_model(vocab_size=29, num_exits=2),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A folder with a model, and its description."""
    folder = tmp_path_factory.mktemp(request.param)
    save_pretrained(folder, MODELS[request.param](), CharTokenizer(), {"data": "none"})
    return folder, json.loads((folder / "model.json").read_text())


def test_saved_models(saved):
    folder, sound = saved
    del sound["about"]

    @fuzz(10)
    @given(content=damaged_json(sound))
    def every(content):
        about = {"about": {}} if isinstance(content, dict) else {}
        (folder / "model.json").write_text(json.dumps(content | about))
        found = read_or_refuse(load_pretrained, folder)
        if found is not None:
            model, tokenizer, _ = found
            assert type(model).__name__.lower() == sound["family"].replace("_", "")
            assert tokenizer.vocab_size >= model.config.vocab_size

    every()
    for text in ("[" * 100_000, "", "[]", "null", json.dumps(sound)):
        (folder / "model.json").write_text(text)
        assert read_or_refuse(load_pretrained, folder) is None


SIZES = ("width", "num_layers", "num_heads", "ffn_width", "num_mels", "vocab_size", "num_exits")


@pytest.mark.parametrize("number", [2**16, 2**20, 2**31, 10**30])
@pytest.mark.parametrize("name", SIZES)
def test_sizes(saved, name, number):
    """One number of the configuration too large: refused, in memory for a model of the file's weights."""
    folder, sound = saved
    if name not in sound["config"]:
        pytest.skip("this family has no such size")
    config = sound["config"] | {name: number}
    (folder / "model.json").write_text(json.dumps(sound | {"config": config, "about": {}}))
    assert read_or_refuse(load_pretrained, folder) is None


def test_hugging_face(tmp_path):
    folder = hf_checkpoint.write(tmp_path)
    sound = hf_checkpoint.CONFIG

    @fuzz(10)
    @given(content=damaged_json(sound))
    def every(content):
        (folder / "config.json").write_text(json.dumps(content))
        found = read_or_refuse(load_hf_wav2vec2, folder)
        if found is not None:
            assert found.model.config.vocab_size == found.tokenizer.vocab_size

    every()
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_conv_pos_embeddings",
    ):
        (folder / "config.json").write_text(json.dumps(sound | {name: 2**31}))
        assert read_or_refuse(load_hf_wav2vec2, folder) is None


def test_hugging_face_vocabularies(tmp_path):
    folder = hf_checkpoint.write(tmp_path)

    @fuzz(8)
    @given(content=damaged_json(hf_checkpoint.IDS))
    def every(content):
        (folder / "vocab.json").write_text(json.dumps(content))
        found = read_or_refuse(load_hf_wav2vec2, folder)
        if found is not None:
            assert found.model.config.vocab_size == found.tokenizer.vocab_size

    every()
