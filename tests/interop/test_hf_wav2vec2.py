"""Checkpoints of transformers: the golden file needs NumPy alone, parity needs PyTorch and transformers."""

import copy
import dataclasses
import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.interop.hf_layout import hf_names
from edgespeech.interop.hf_wav2vec2 import load_hf_wav2vec2, save_hf_wav2vec2
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from edgespeech.nn.token_mixer_controls import Removed
from edgespeech.ops.ctc import ctc_loss
from edgespeech.ops.features import SpecAugmentConfig, time_spans
from tests.golden.hf_checkpoint import GOLDEN, IDS, TENSORS, without, write

GAIN = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0"
DIRECTION = GAIN[:-1] + "1"
MASK = "wav2vec2.masked_spec_embed"
QUERY = "wav2vec2.encoder.layers.1.attention.q_proj.weight"


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, state, audio, lengths):
    return nnx.merge(graphdef, state)(audio, lengths)


def run(model, audio=GOLDEN["audio"]):
    return forward(*nnx.split(model), audio, np.full(len(audio), audio.shape[1]))


def params(model):
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(value[...]) for path, value in state}


def old_form(name):
    """A tensor's name as PyTorch wrote it before parametrizations."""
    name = name.replace("parametrizations.weight.original0", "weight_g")
    return name.replace("parametrizations.weight.original1", "weight_v")


def close(found, wanted, tolerance=1e-4, name=""):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance, err_msg=name)


# --- without PyTorch


def test_golden(tmp_path):
    model, tokenizer, normalise, has_head, notes = load_hf_wav2vec2(write(tmp_path))
    output = run(model)
    close(np.stack(output.hidden), GOLDEN["hidden"], 1e-5)
    close(output.logits, GOLDEN["logits"], 1e-5)
    assert (normalise, has_head, notes) == (True, True, ())
    assert tokenizer.vocabulary == tuple(GOLDEN["tokens"])
    assert tokenizer.encode("A CAT").tolist() == [7, 4, 19, 7, 6]


def test_golden_training_step(tmp_path):
    graphdef, state = nnx.split(load_hf_wav2vec2(write(tmp_path)).model, nnx.Param)
    labels = GOLDEN["labels"], GOLDEN["label_lengths"]
    value, _, grads, after = training_step(
        graphdef, state, GOLDEN["audio"], np.full(2, GOLDEN["audio"].shape[1]), *labels
    )
    np.testing.assert_allclose(value, GOLDEN["loss"], rtol=1e-5)
    wanted = [
        {old_form(k.removeprefix(kind)): GOLDEN[k] for k in GOLDEN.files if k.startswith(kind)}
        for kind in ("gradients/", "stepped/")
    ]
    assert_step(graphdef, grads, after, *wanted)


def test_table_names_every_parameter_once():
    config = Wav2Vec2Config(
        width=16, num_layers=3, num_heads=2, ffn_width=8, front_channels=8, position_kernel=4
    )
    model = Wav2Vec2(config, rngs=nnx.Rngs(0))
    table = hf_names(3)
    assert table.keys() == params(model).keys()
    assert len(set(table.values())) == len(table)


def test_old_weight_norm_names_and_a_file_in_place_of_the_folder(tmp_path):
    old = {old_form(name): tensor for name, tensor in TENSORS.items()}
    assert len(old.keys() - TENSORS.keys()) == 2
    model = load_hf_wav2vec2(write(tmp_path, old) / "model.safetensors").model
    close(run(model).logits, GOLDEN["logits"], 1e-5)


def test_without_head(tmp_path):
    bare = {
        name.removeprefix("wav2vec2."): tensor
        for name, tensor in without("lm_head.weight", "lm_head.bias").items()
    }
    pretraining = without("lm_head.weight", "lm_head.bias") | {
        "quantizer.codevectors": np.zeros((1, 2, 3), np.float32),
        "project_q.weight": np.zeros((2, 3), np.float32),
        "project_hid.bias": np.zeros(2, np.float32),
    }
    for tensors in (bare, pretraining):
        model, tokenizer, _, has_head, notes = load_hf_wav2vec2(write(tmp_path, tensors))
        close(np.stack(run(model).hidden), GOLDEN["hidden"], 1e-5)
        assert notes == (
            "not in the checkpoint, initialised at random: lm_head.weight, lm_head.bias",
        )
        assert tokenizer.vocab_size == model.config.vocab_size == 32
        assert not has_head
    (tmp_path / "vocab.json").unlink()
    model, tokenizer, _, has_head, notes = load_hf_wav2vec2(tmp_path)
    assert tokenizer.vocab_size == model.config.vocab_size == 29
    assert "no vocab.json" in notes[0]


def test_without_mask_embedding_as_base_960h(tmp_path):
    model, *_, notes = load_hf_wav2vec2(write(tmp_path, without(MASK)))
    close(run(model).logits, GOLDEN["logits"], 1e-5)
    assert notes == (f"not in the checkpoint, initialised at random: {MASK}",)


def test_do_normalize_is_returned_and_cancelled_by_the_group_norm(tmp_path):
    model, _, normalise, *_ = load_hf_wav2vec2(write(tmp_path, processor={"do_normalize": False}))
    assert normalise is False
    close(run(model, 0.3 * GOLDEN["audio"] - 0.1).logits, GOLDEN["logits"])


def test_half_precision_is_widened(tmp_path):
    half = {name: tensor.astype(np.float16) for name, tensor in TENSORS.items()}
    model = load_hf_wav2vec2(write(tmp_path, half)).model
    half = {old_form(name): tensor for name, tensor in half.items()}
    for name, value in params(model).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value.T, half[hf_names(2)[name]])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(QUERY), f"{QUERY} is missing"),
        (without("lm_head.bias"), "lm_head.bias is missing"),
        (without(DIRECTION), "conv.weight_v is missing"),
        (TENSORS | {QUERY: np.zeros((16, 8), np.float32)}, r"q_proj.weight has shape \[16, 8\] instead of \[16, 16\]"),
        (TENSORS | {QUERY: TENSORS[QUERY] * np.nan}, f"{QUERY} holds values that are not finite"),
        (TENSORS | {"classifier.weight": TENSORS[QUERY]}, "config.json: classifier.weight is not part"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(tmp_path, tensors, message):
    with pytest.raises(InputError, match=message):
        load_hf_wav2vec2(write(tmp_path, tensors))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"feat_extract_norm": "layer"}, "feat_extract_norm='layer'"),
        ({"conv_bias": True, "hidden_act": "relu"}, "hidden_act='relu' .*conv_bias=True"),
        ({"conv_stride": [5, 2, 2, 2, 2, 2, 1]}, "conv_stride"),
        ({"conv_dim": [8, 8, 8, 8, 8, 8, 9]}, "conv_dim"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06"),
        ({"pad_token_id": 31}, "pad_token_id=31"),
        ({"model_type": "hubert"}, "model_type='hubert'"),
        ({"adapter_attn_dim": 16}, "adapter_attn_dim=16"),
        ({"processor": {"sampling_rate": 8000}}, "sampling_rate=8000"),
        ({"num_attention_heads": 3}, "num_heads is 3"),
        ({"hidden_size": "16"}, "does not describe a model"),
        ({"vocab_size": 31}, "vocab_size=31"),
        ({"vocab": {"<pad>": 1, "|": 0}, "vocab_size": 2}, "<pad> at 1"),
        ({"vocab": {"eng": {"a": 0}}}, "not a vocabulary"),
        ({"vocab": None}, "vocab.json is missing"),
        ({"tensors": None}, "holds neither model.safetensors nor pytorch_model.bin"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        load_hf_wav2vec2(write(tmp_path, **config))


def test_added_tokens_fill_the_head_and_do_not_exceed_it(tmp_path):
    vocab = dict(list(IDS.items())[:30])
    (tmp_path / "added_tokens.json").write_text(json.dumps({"Q": 30, "Z": 31, "<x>": 32}))
    tokenizer = load_hf_wav2vec2(write(tmp_path, vocab=vocab)).tokenizer
    assert tokenizer.vocabulary == tuple(GOLDEN["tokens"])


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "model.safetensors"])
def test_damaged_file_is_named(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(InputError, match=f"{name} is "):
        load_hf_wav2vec2(tmp_path)


def test_missing_path_and_config(tmp_path):
    with pytest.raises(InputError, match="is missing: name a folder"):
        load_hf_wav2vec2(tmp_path / "no" / "where")
    write(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json is damaged \(a list"):
        load_hf_wav2vec2(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        load_hf_wav2vec2(tmp_path)


def test_hub(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append((repo, *allow_patterns))
        if repo == "some/offline":
            raise ConnectionError("no route")
        if repo == "some/safe":
            write(tmp_path)
        return str(tmp_path)

    monkeypatch.setitem(
        sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download)
    )
    with pytest.raises(InputError, match="holds neither"):
        load_hf_wav2vec2("some/empty")
    close(run(load_hf_wav2vec2("some/safe").model).logits, GOLDEN["logits"], 1e-5)
    assert asked == [
        ("some/empty", "*.json", "model.safetensors"),
        ("some/empty", "*.json", "pytorch_model.bin"),
        ("some/safe", "*.json", "model.safetensors"),
    ]
    with pytest.raises(InputError, match=r"some/offline .*cannot be had .*ConnectionError"):
        load_hf_wav2vec2("some/offline")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="needs huggingface_hub"):
        load_hf_wav2vec2("some/offline")


def test_bin_without_pytorch(tmp_path, monkeypatch):
    write(tmp_path, None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"any")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pytorch_model.bin needs PyTorch .*edgespeech\[torch\]"):
        load_hf_wav2vec2(tmp_path)


def test_round_trip(tmp_path):
    model, tokenizer, *_ = load_hf_wav2vec2(write(tmp_path, hidden_dropout=0.25))
    save_hf_wav2vec2(tmp_path / "saved", model, tokenizer)
    again = load_hf_wav2vec2(tmp_path / "saved")
    assert again.model.config == model.config
    assert again.model.config.dropout == 0.25
    assert again.tokenizer.vocabulary == tokenizer.vocabulary
    for (name, found), wanted in zip(
        params(again.model).items(), params(model).values(), strict=True
    ):
        np.testing.assert_array_equal(found, wanted, err_msg=name)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == {old_form(name) for name in TENSORS}
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(saved[old_form(name)], tensor, err_msg=name)


def test_save_refuses_what_upstream_lacks(tmp_path):
    model, tokenizer, *_ = load_hf_wav2vec2(write(tmp_path))
    with pytest.raises(InputError, match="29 tokens and blank 0, the head needs 32"):
        save_hf_wav2vec2(tmp_path / "x", model, CharTokenizer())
    model.layers[1].mixer = Removed()
    with pytest.raises(InputError, match="layer 2 holds Removed"):
        save_hf_wav2vec2(tmp_path / "x", model, tokenizer)
    config = Wav2Vec2Config(
        width=16, num_layers=1, num_heads=2, ffn_width=8, front_end="logmel", front_channels=8
    )
    with pytest.raises(InputError, match="front end is 'logmel'"):
        save_hf_wav2vec2(tmp_path / "x", Wav2Vec2(config, rngs=nnx.Rngs(0)), tokenizer)
    assert not (tmp_path / "x").exists()


# --- against PyTorch


@pytest.fixture(scope="module")
def make():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden import make_hf_wav2vec2

    return make_hf_wav2vec2


@pytest.fixture(scope="module")
def load(make, tmp_path_factory):
    """Builds models of theirs, each once: `(**sizes) -> (theirs, ours, folder)`."""
    built = {}

    def load(**sizes):
        key = tuple(sorted(sizes.items()))
        if key not in built:
            theirs = make.random_model(**sizes)
            folder = tmp_path_factory.mktemp("checkpoint")
            theirs.save_pretrained(folder)
            (folder / "vocab.json").write_text(json.dumps(IDS))
            built[key] = theirs, load_hf_wav2vec2(folder).model, folder
        return built[key]

    return load


def speechlike(samples, rows=2, amplitude=0.1):
    noise = np.random.default_rng(samples).normal(0.1, 1.0, (rows, samples))
    return (amplitude * noise).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def training_step(graphdef, state, audio, audio_lengths, labels, lengths):
    """Loss, output, gradients and the parameters after one step of AdamW."""

    def loss(state):
        output = nnx.merge(graphdef, state, copy=True)(audio, audio_lengths)
        return jnp.sum(ctc_loss(output.logits, output.lengths, labels, lengths)), output

    (value, output), grads = jax.value_and_grad(loss, has_aux=True)(state)
    # An epsilon of the gradients' size: with a small one the step is their sign, rounding included.
    optimizer = optax.adamw(1e-2, eps=1.0, weight_decay=0.1)
    updates, _ = optimizer.update(grads, optimizer.init(state), state)
    return value, output, grads, optax.apply_updates(state, updates)


def assert_step(graphdef, grads, after, gradient, stepped):
    """Our gradients and parameters after a step are theirs, which go by their names."""
    grads, after = nnx.merge(graphdef, grads), nnx.merge(graphdef, after)
    table = hf_names(len(after.layers))
    for name, found in params(grads).items():
        want = gradient[table[name]]
        # relative to the tensor's largest; where that is 0 in exact arithmetic (a key's bias) to 1
        largest = np.abs(want).max()
        close(found.T, want, 1e-4 * (largest if largest > 1e-6 else 1.0), name)
    for name, found in params(after).items():
        close(found.T, stepped[table[name]], 1e-5, name)


def assert_parity(make, theirs, model, samples, padded_to):
    """Hidden states, logits, loss, gradients and the parameters after a step of AdamW.

    Ours run in a buffer of one size for many lengths, which compiles once; theirs never see padding. Theirs run in
    float64: at 2.3 s the gradients of their float32 CTC are off by up to 1.8e-4 of a tensor's largest, ours by 1.2e-5.
    """
    import torch

    audio = speechlike(samples)
    n = model.config.num_frames(samples)
    lengths = np.array([min(6, 1 + n // 3), min(3, 1 + n // 4)])
    labels = np.random.default_rng(1).integers(1, 32, (2, 6))
    is_token = np.arange(6) < lengths[:, None]
    with torch.no_grad():
        wanted = copy.deepcopy(theirs).double()(
            make.normalised(audio.astype(np.float64)).double(),
            labels=torch.tensor(np.where(is_token, labels, -100)),
            output_hidden_states=True,
        )
    graphdef, state = nnx.split(model, nnx.Param)
    buffer = np.pad(audio, ((0, 0), (0, padded_to - samples)))
    value, output, grads, after = training_step(
        graphdef, state, buffer, np.full(2, samples), labels, lengths
    )
    assert len(output.hidden) == len(wanted.hidden_states) - 1
    for layer, hidden in enumerate(output.hidden):
        close(hidden[:, :n], wanted.hidden_states[layer + 1], name=f"layer {layer + 1}")
    close(output.logits[:, :n], wanted.logits)
    np.testing.assert_allclose(value, wanted.loss.item(), rtol=1e-4)
    # upstream's loss, which rounds to float32, once more in float64
    loss, *step = make.training_step(theirs, audio, labels, lengths)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    gradient, stepped = ({old_form(k): v for k, v in values.items()} for values in step)
    assert_step(graphdef, grads, after, gradient, stepped)


@pytest.mark.parametrize("samples", [400, 8000, 16000, 36800])
def test_parity(make, load, samples):
    theirs, model, _ = load()
    assert_parity(make, theirs, model, samples, padded_to=36800)


def test_parity_of_a_single_frame_alone(make, load):
    theirs, model, _ = load()
    audio = speechlike(400)
    wanted = theirs(make.normalised(audio)).logits.detach()
    assert wanted.shape == (2, 1, 32)
    close(run(model, audio).logits, wanted)


def test_parity_of_layer_norm_first_with_an_odd_depthwise_position_kernel(make, load):
    theirs, model, _ = load(norm_first=True, kernel=15, groups=32)
    assert model.config.norm_first
    assert_parity(make, theirs, model, 8000, padded_to=8000)


def test_parity_at_the_size_of_base(make, load):
    theirs, model, _ = load(
        width=768, heads=12, channels=512, ffn_width=3072, kernel=128, groups=16
    )
    assert dataclasses.replace(model.config, num_layers=12) == Wav2Vec2Config.base()
    assert_parity(make, theirs, model, 8000, padded_to=8000)


def test_parity_of_every_layer_of_base(make, load):
    """Outputs alone: with random weights the gradients of late queries and keys vanish below rounding."""
    import torch

    theirs, model, _ = load(
        width=768, heads=12, layers=12, channels=512, ffn_width=3072, kernel=128, groups=16
    )
    assert model.config == Wav2Vec2Config.base()
    model.scan_layers = True
    for samples in (4000, 16000):
        audio = speechlike(samples)
        with torch.no_grad():
            wanted = theirs(make.normalised(audio), output_hidden_states=True)
        output = run(model, audio)
        close(np.stack(output.hidden), np.stack(wanted.hidden_states[1:]))
        close(output.logits, wanted.logits)


@pytest.mark.parametrize("amplitude", [0.0, 3e-4, 0.03])
def test_parity_of_quiet_audio(make, load, amplitude):
    theirs, model, _ = load()
    audio = speechlike(4000, amplitude=amplitude)
    close(run(model, audio).logits, theirs(make.normalised(audio)).logits.detach())


def test_parity_of_the_mask_embedding(make, load):
    import torch

    theirs, ours, _ = load()
    augment = SpecAugmentConfig(time_mask_rate=0.2, time_width=5)
    config = dataclasses.replace(ours.config, dropout=0.0, spec_augment=augment)
    model = Wav2Vec2(config, rngs=nnx.Rngs(1))
    nnx.update(model, nnx.state(ours, nnx.Param))
    key, audio = jax.random.key(3), speechlike(4000)
    lengths = jnp.full(2, config.num_frames(4000))
    augment_key = jax.random.split(key, config.num_layers + 2)[0]
    spans = np.asarray(time_spans(augment_key, lengths, int(lengths[0]), augment))
    assert 1 < spans.sum() < spans.size / 2
    theirs = copy.deepcopy(theirs)
    wanted = theirs.wav2vec2(make.normalised(audio), mask_time_indices=torch.tensor(spans))
    wanted.last_hidden_state.square().sum().backward()

    def energy(model):
        hidden = model(jnp.asarray(audio), jnp.full(2, 4000), key).hidden[-1]
        return jnp.sum(jnp.square(hidden)), hidden

    grads, hidden = nnx.jit(nnx.grad(energy, has_aux=True))(model)
    close(hidden, wanted.last_hidden_state.detach())
    want = theirs.wav2vec2.masked_spec_embed.grad.numpy()
    close(grads["mask_embedding"][...], want, 1e-4 * max(1.0, np.abs(want).max()))


def test_upstream_reads_what_we_write(make, load, tmp_path):
    import transformers

    theirs, model, folder = load()
    tokenizer = load_hf_wav2vec2(folder).tokenizer
    save_hf_wav2vec2(tmp_path, model, tokenizer)
    loaded: Any = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path, output_loading_info=True)
    again, info = loaded
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    audio = speechlike(4000)
    wanted = theirs(make.normalised(audio)).logits.detach()
    close(again.eval()(make.normalised(audio)).logits.detach(), wanted, 1e-6)
    processor = transformers.Wav2Vec2Processor.from_pretrained(tmp_path)
    assert processor.feature_extractor.do_normalize
    text = "IT'S A TEST"
    assert processor.tokenizer(text).input_ids == tokenizer.encode(text).tolist()
    assert len(processor.tokenizer) == 32
    own = CharTokenizer()
    small = Wav2Vec2(dataclasses.replace(model.config, vocab_size=29), rngs=nnx.Rngs(0))
    save_hf_wav2vec2(tmp_path / "own", small, own)
    theirs_too = transformers.Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "own")
    assert len(theirs_too) == 29
    assert theirs_too(text).input_ids == own.encode(text).tolist()


def test_bin_holds_tensors_alone(load, tmp_path):
    import torch

    theirs, model, folder = load()
    for name in ("config.json", "vocab.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    found = params(load_hf_wav2vec2(tmp_path).model)
    for name, wanted in params(model).items():
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"lm_head.bias": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="not a file of tensors alone"):
        load_hf_wav2vec2(tmp_path)
    assert not (tmp_path / "executed").exists()
