"""Saved models: what is loaded is what was saved, and what is not a model is refused with its name."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from edgespeech.conversion.mixers import control_factory, lpa_factory
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.interop import pretrained
from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA, LPAConfig, set_anneal
from edgespeech.nn.token_mixer_controls import Removed, SlidingWindowAttention
from tests.support.tiny import assert_same_bits, tiny_model, tone_source

SMALL_LPA = LPAConfig(
    aperiodic=2, runs=1, periodic=1, positional=1, kernel_size=3, local_kernel_size=3
)
ABOUT = {"data": "tones", "test_wer": 0.25, "replaced": [1, 2]}


def make_hybrid():
    """LPA, sliding window and nothing, one in each layer."""
    model = tiny_model(seed=4)
    factories = (
        lpa_factory(SMALL_LPA),
        control_factory("sliding_window", window=2),
        control_factory("removed", window=2),
    )
    for index, (layer, factory) in enumerate(zip(model.layers, factories, strict=True)):
        layer.mixer = factory(layer.mixer, nnx.Rngs(index))
    set_anneal(model, 1.0, 1.0)
    return model


def logits(model):
    batch = tone_source().batch(0)
    return np.asarray(model(batch.audio, batch.audio_lengths).logits)


@pytest.fixture
def saved(tmp_path):
    """A folder with a hybrid."""
    save_pretrained(tmp_path / "model", make_hybrid(), CharTokenizer(), ABOUT)
    return tmp_path / "model"


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model(seed=3),
        lambda: tiny_model(seed=3, front_end="waveform", norm_first=False, position_groups=4),
        make_hybrid,
    ],
    ids=["teacher", "waveform", "hybrid"],
)
def test_round_trip(tmp_path, make):
    model = make()
    save_pretrained(tmp_path / "deep" / "model", model, CharTokenizer(), ABOUT)
    loaded, tokenizer, about = load_pretrained(tmp_path / "deep" / "model")
    assert loaded.config == model.config
    assert_same_bits(nnx.state(loaded, nnx.Param), nnx.state(model, nnx.Param))
    np.testing.assert_allclose(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert about == ABOUT
    np.testing.assert_array_equal(tokenizer.encode("AB C"), CharTokenizer().encode("AB C"))


def test_mixers_are_of_the_kinds_that_were_saved(saved):
    loaded, _, _ = load_pretrained(saved)
    kinds = [type(layer.mixer) for layer in loaded.layers]
    assert kinds == [LPA, SlidingWindowAttention, Removed]
    lpa, sliding, _ = (layer.mixer for layer in loaded.layers)
    assert lpa.config == SMALL_LPA
    assert lpa.inference  # LPA is loaded hard
    assert sliding.window == 2
    names = load_file(saved / "weights.safetensors")
    assert "layers.0.mixer.rho_kernel" in names
    assert not [name for name in names if name.startswith("layers.2.mixer.")]


def test_loaded_again_is_saved_the_same(saved, tmp_path):
    model, tokenizer, about = load_pretrained(saved)
    save_pretrained(tmp_path / "again", model, tokenizer, about)
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_model_with_switches_or_the_like_is_not_saved(tmp_path):
    model = tiny_model()
    model.layers[0].mixer = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="cannot save a mixer of type Linear"):
        save_pretrained(tmp_path, model, CharTokenizer(), {})
    assert not (tmp_path / "model.json").exists()


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(InputError, match=rf"{saved}/{name} is missing"):
        load_pretrained(saved)


def test_a_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"nowhere/model.json is missing: name a folder"):
        load_pretrained(tmp_path / "nowhere")


def test_a_save_that_was_cut_short_does_not_load(saved, monkeypatch):
    # A second save into the same folder, of another model: the old description may not stay beside new weights.
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(saved, tiny_model(), CharTokenizer(), {})
    with pytest.raises(InputError, match=r"model\.json is missing"):
        load_pretrained(saved)


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("part", [0, 0.5])
def test_half_a_file(saved, name, part):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(part * len(content))])
    with pytest.raises(InputError, match=r"does not hold a readable model|is damaged") as error:
        load_pretrained(saved)
    assert str(saved) in str(error.value)


def change_weights(folder, change):
    weights = load_file(folder / "weights.safetensors")
    change(weights)
    save_file(weights, folder / "weights.safetensors")


def test_names_and_shapes_of_wrong_tensors_are_in_the_message(saved):
    def change(weights):
        del weights["head.bias"]
        weights["tail.bias"] = np.zeros(3, np.float32)
        weights["norm.scale"] = np.zeros((2, 16), np.float32)

    change_weights(saved, change)
    with pytest.raises(InputError, match=r"weights.safetensors belongs to another model") as error:
        load_pretrained(saved)
    message = str(error.value)
    assert "head.bias is missing" in message
    assert "tail.bias is not part of the model" in message
    assert "norm.scale has shape [2, 16] instead of [16]" in message


def test_many_wrong_tensors_are_counted(saved):
    change_weights(saved, lambda w: w.update({f"extra.{i}": np.zeros(1) for i in range(20)}))
    with pytest.raises(
        InputError, match=r"extra\.0 is not part of the model; .* and 12 more; save"
    ):
        load_pretrained(saved)


def test_weights_that_are_not_finite(saved):
    change_weights(saved, lambda w: w.update({"head.bias": w["head.bias"] * np.nan}))
    with pytest.raises(InputError, match=r"head\.bias holds values that are not finite; save the"):
        load_pretrained(saved)


def test_folder_from_before_padding_was_a_setting(saved):
    path = saved / "model.json"
    description = json.loads(path.read_text())
    assert description["config"].pop("padding") == "exact"
    path.write_text(json.dumps(description))
    assert load_pretrained(saved)[0].config.padding == "exact"


def test_weights_of_another_model(saved, tmp_path):
    save_pretrained(tmp_path / "other", tiny_model(ffn_width=48), CharTokenizer(), {})
    shutil.copy(tmp_path / "other" / "weights.safetensors", saved)
    with pytest.raises(InputError, match=r"layers\.0\.ffn\.contract\.kernel has shape \[48, 16\]"):
        load_pretrained(saved)


def change_description(folder, **changes):
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"is of format 2, family 'wav2vec2': this version reads format 1"),
        ({"family": "fourier"}, r"family 'fourier'"),
        ({"config": {"width": 16}}, r"does not hold a readable model"),
        ({"mixers": [{"kind": "attention"}]}, r"does not hold a readable model"),
        ({"mixers": [{"kind": "fourier"}] * 3}, r"a mixer of kind 'fourier', which this version"),
    ],
)
def test_another_family_or_format(saved, changes, message):
    change_description(saved, **changes)
    with pytest.raises(InputError, match=message):
        load_pretrained(saved)


def test_a_description_that_is_no_object(saved):
    (saved / "model.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="does not hold a readable model"):
        load_pretrained(saved)


def test_summary_mixing_is_saved_too(tmp_path):
    model = tiny_model(seed=5)
    for layer in model.layers:
        layer.mixer = control_factory("summary_mixing", 1)(layer.mixer, nnx.Rngs(3))
    save_pretrained(tmp_path, model, CharTokenizer(), {})
    loaded, _, _ = load_pretrained(tmp_path)
    assert_same_bits(nnx.state(loaded, nnx.Param), nnx.state(model, nnx.Param))
    np.testing.assert_allclose(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_attention_stays_attention(tmp_path):
    save_pretrained(tmp_path, tiny_model(), CharTokenizer(), {})
    loaded, _, _ = load_pretrained(tmp_path)
    assert all(isinstance(layer.mixer, SelfAttention) for layer in loaded.layers)
