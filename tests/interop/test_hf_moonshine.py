"""Moonshine checkpoints: written and read by us, and against transformers' model."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from edgespeech.errors import InputError
from edgespeech.inference.seq2seq import beam_search, greedy_search
from edgespeech.interop.hf_moonshine import hf_names, load_hf_moonshine, save_hf_moonshine
from edgespeech.interop.tensors import named_params
from edgespeech.models.moonshine import decoder_input
from edgespeech.nn.token_mixer_controls import Removed
from edgespeech.ops.cross_entropy import token_cross_entropy
from tests.support.moonshine import speech, tiny_moonshine

QUERY = "model.encoder.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.decoder.embed_tokens.weight"


def params(model):
    return {name: np.asarray(value[...]) for name, value in named_params(model).items()}


@pytest.fixture
def folder(tmp_path):
    save_hf_moonshine(tmp_path, tiny_moonshine())
    return tmp_path


def change_config(folder, remove=(), **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)


# --- without PyTorch


def test_table_names_every_parameter_once():
    model = tiny_moonshine()
    table = hf_names(2, 2)
    assert table.keys() == params(model).keys()
    assert len(set(table.values())) == len(table)


def test_round_trip(folder):
    model, tokenizer = load_hf_moonshine(folder)
    wanted = tiny_moonshine()
    assert model.config == wanted.config
    for name, value in params(model).items():
        np.testing.assert_array_equal(value, params(wanted)[name], err_msg=name)
    assert tokenizer is None
    tensors = load_file(folder / "model.safetensors")
    kernel = params(wanted)["layers.1.mixer.q_proj.kernel"]
    np.testing.assert_array_equal(tensors[QUERY], kernel.T)
    np.testing.assert_array_equal(tensors[EMBEDDING], params(wanted)["embedding"])


def test_tokenizer_and_older_config(folder):
    content = {"model": {"vocab": {"▁a": 3, "b": 4}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    old = {"partial_rotary_factor": 0.8, "rope_theta": 10_000.0, "rope_scaling": None}
    change_config(folder, remove=("rope_parameters",), **old, pad_head_dim_to_multiple_of=8)
    model, tokenizer = load_hf_moonshine(folder)
    assert model.config == tiny_moonshine().config
    assert tokenizer is not None
    assert tokenizer.decode([3, 4, 3]) == "ab a"


def test_tied_head_under_either_name(folder):
    change_tensors(folder, lambda t: t.update({"proj_out.weight": t[EMBEDDING]}))
    both = params(load_hf_moonshine(folder).model)["embedding"]
    change_tensors(folder, lambda t: t.pop(EMBEDDING))
    alone = params(load_hf_moonshine(folder).model)["embedding"]
    wanted = params(tiny_moonshine())["embedding"]
    np.testing.assert_array_equal(both, wanted)
    np.testing.assert_array_equal(alone, wanted)
    change_tensors(folder, lambda t: t.update({EMBEDDING: t["proj_out.weight"] + 1}))
    with pytest.raises(InputError, match=r"proj_out.weight differs from .*embed_tokens"):
        load_hf_moonshine(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY), f"{QUERY} is missing"),
        (lambda t: t.update({"extra": t[QUERY]}), "extra is not part of the model"),
        (lambda t: t.update({QUERY: t[QUERY][:8]}), r"q_proj.weight has shape \[8, 16\] instead of \[16, 16\]"),
        (lambda t: t.update({QUERY: t[QUERY] * np.nan}), f"{QUERY} holds values that are not finite"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(InputError, match=message):
        load_hf_moonshine(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "whisper"}, "model_type='whisper'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"decoder_num_attention_heads": 4}, r"decoder_num_attention_heads=4 \(only 2\)"),
        ({"encoder_num_key_value_heads": 1}, "encoder_num_key_value_heads=1"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta=500000.0"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"hidden_size": "16"}, "does not describe a model"),
        ({"hidden_size": 15}, "model.num_heads is 2"),
    ],
)
def test_wrong_configs_are_named(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        load_hf_moonshine(folder)


def test_save_refuses_a_hybrid(tmp_path):
    model = tiny_moonshine()
    model.layers[1].mixer = Removed()
    with pytest.raises(InputError, match="layer 2 holds Removed"):
        save_hf_moonshine(tmp_path / "hybrid", model)
    assert not (tmp_path / "hybrid").exists()


# --- against transformers


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Theirs in float64 and ours, with the same random weights, read from what theirs writes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.MoonshineConfig(
        vocab_size=11,
        hidden_size=32,
        intermediate_size=40,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.62,
        },
        pad_token_id=2,
    )
    torch.manual_seed(0)
    theirs = transformers.MoonshineForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.2 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(folder)
    model = load_hf_moonshine(folder).model
    assert model.config.rotary_width == 4
    return theirs.double(), model


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(graphdef, state, audio, audio_lengths, labels, label_lengths):
    def loss(state):
        output = nnx.merge(graphdef, state, copy=True)(
            audio, audio_lengths, decoder_input(labels, 1), label_lengths
        )
        total = jnp.sum(token_cross_entropy(output.logits, labels, label_lengths))
        return total / jnp.sum(label_lengths), output

    return jax.value_and_grad(loss, has_aux=True)(state)


def close(found, wanted, tolerance, name=""):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(
        found, wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()), err_msg=name
    )


@pytest.mark.parametrize("samples", [895, 6000, 16_000])
def test_parity(pair, samples):
    """Hidden states, logits, loss and gradients; ours in a padded buffer, theirs without padding."""
    import torch

    theirs, model = pair
    audio, _ = speech((samples, samples))
    labels = np.array([[5, 9, 3, 2], [7, 2, 0, 0]])
    label_lengths = np.array([4, 2])
    theirs.zero_grad()
    is_label = np.arange(4) < label_lengths[:, None]
    wanted = theirs(
        torch.tensor(audio, dtype=torch.float64),
        labels=torch.tensor(np.where(is_label, labels, -100)),
        output_hidden_states=True,
    )
    wanted.loss.backward()
    buffer = np.pad(audio, ((0, 0), (0, 16_000 - samples)))
    (loss, output), gradients = value_and_grad(
        *nnx.split(model), buffer, np.full(2, samples), labels, label_lengths
    )
    n = model.config.num_frames(samples)
    assert output.lengths.tolist() == [n, n]

    # theirs count the input of the first layer, and give the last one normalised
    encoder = [h.detach() for h in wanted.encoder_hidden_states]
    assert len(output.hidden) == len(encoder) - 1
    for found, want in zip(output.hidden[:-1], encoder[1:-1], strict=True):
        close(found[:, :n], want, 1e-5)
    close(output.memory[:, :n], wanted.encoder_last_hidden_state.detach(), 1e-5)
    decoder = [h.detach() for h in wanted.decoder_hidden_states]
    assert len(output.decoder_hidden) == len(decoder) - 1
    for row, u in enumerate(label_lengths):
        for found, want in zip(output.decoder_hidden[:-1], decoder[1:-1], strict=True):
            close(found[row, :u], want[row, :u], 1e-5)
        close(output.logits[row, :u], wanted.logits.detach()[row, :u], 2e-5)
    np.testing.assert_allclose(loss, wanted.loss.item(), rtol=1e-5)

    table = hf_names(2, 2)
    theirs_gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert set(table.values()) == set(theirs_gradients)
    for name, found in params(nnx.merge(nnx.graphdef(model), gradients)).items():
        want = theirs_gradients[table[name]]
        want = want if table[name] == EMBEDDING else want.T
        close(found, want, 1e-4 * min(1, np.abs(want).max()) + 1e-7, name)


@functools.partial(jax.jit, static_argnums=(0, 4))
def search(graphdef, state, audio, lengths, width):
    model = nnx.merge(graphdef, state)
    memory, memory_lengths, _ = model.encode(audio, lengths)
    limits = jnp.full(len(audio), 6)
    if width == 1:
        return greedy_search(model, memory, memory_lengths, limits, 6)
    return beam_search(model, memory, memory_lengths, limits, 6, width=width, length_penalty=1.0)


@pytest.mark.parametrize("width", [1, 3])
def test_same_tokens_as_generate(pair, width):
    import torch

    theirs, model = pair
    audio, lengths = speech((8000,) * 6, seed=4)
    arguments = {} if width == 1 else {"early_stopping": "never", "length_penalty": 1.0}
    wanted = theirs.generate(
        torch.tensor(audio, dtype=torch.float64),
        max_new_tokens=6,
        num_beams=width,
        do_sample=False,
        **arguments,
    ).numpy()[:, 1:]
    wanted = np.pad(wanted, ((0, 0), (0, 6 - wanted.shape[1])), constant_values=2)
    found = search(*nnx.split(model), audio, lengths, width)
    np.testing.assert_array_equal(found.tokens, wanted)
    assert len({tuple(row) for row in wanted}) > 1


def test_upstream_reads_what_we_write(pair, tmp_path):
    import torch
    import transformers

    theirs, model = pair
    save_hf_moonshine(tmp_path, model)
    again, info = transformers.MoonshineForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    audio, tokens = torch.tensor(speech((5000,))[0]), torch.tensor([[1, 4, 9]])
    with torch.no_grad():
        wanted = theirs(audio.double(), decoder_input_ids=tokens).logits
        found = again.eval()(audio, decoder_input_ids=tokens).logits
    close(found, wanted, 1e-5)
