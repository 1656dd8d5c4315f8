"""Released checkpoints: the layout by name, parity with PyTorch, files that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from edgespeech.errors import InputError
from edgespeech.interop.splitformer_checkpoint import (
    load_splitformer_checkpoint,
    splitformer_names,
)
from edgespeech.models.splitformer import SplitformerConfig
from edgespeech.nn.exits import exit_ctc_losses
from tests.nn.test_mel_subsampling import mel_matrix
from tests.support import reference
from tests.support.tiny_exits import exit_config, exit_model


def variables(model):
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(state)}


def upstream_tensors(model):
    """The tensors of a model in the released layout."""
    tensors = {"positional_encoder.pe": np.zeros((20, 1, 8), np.float32)}
    ours = variables(model)
    joint = {}
    for name, theirs in splitformer_names(model.config).items():
        tensor = ours[name].T
        if name.endswith("conv.depthwise"):
            tensor = tensor[:, None, :]
        elif name.endswith(("conv.expand.kernel", "conv.contract.kernel")):
            tensor = tensor[..., None]
        module, _, kind = theirs.rpartition(".")
        if module.endswith(("q_proj", "k_proj", "v_proj")):
            joint.setdefault(f"{module[:-6]}in_proj_{kind}", {})[module[-6]] = tensor
        else:
            tensors[theirs] = tensor
    for name, parts in joint.items():
        tensors[name] = np.concatenate([parts[letter] for letter in "qkv"])
    # safetensors writes the memory as it lies.
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


@pytest.fixture
def saved(tmp_path):
    """A file, its tensors and its model."""
    model = exit_model()
    tensors = upstream_tensors(model)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", tensors, model


def test_published_layout():
    config = SplitformerConfig.splitformer()
    theirs = set(splitformer_names(config).values())
    for name in (
        "conv_subsample.sequential.0.weight",
        "conv_subsample.sequential.1.bias",
        "conformer.5.conformer_layers.1.ffn1.sequential.4.weight",
        "conformer.0.conformer_layers.0.conv_module.sequential.3.running_var",
        "conformer_parallel.1.conformer_layers.0.final_layer_norm.bias",
        "linears.5.weight",
    ):
        assert name in theirs
    # 36 tensors a layer, 14 layers; two convolutions; six heads.
    assert len(theirs) == 14 * 36 + 4 + 12
    assert not any("conformer_parallel.2" in name for name in theirs)


def test_every_variable_is_loaded(saved):
    path, _, model = saved
    loaded = load_splitformer_checkpoint(path, model.config)
    got, want = variables(loaded), variables(model)
    assert got.keys() == want.keys() == splitformer_names(model.config).keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linears.1.bias": None}, r"linears.1.bias is missing"),
        ({"linears.1.bias": (7,)}, r"linears.1.bias has shape \[7\] instead of \[5\]"),
        ({"linears.3.bias": (5,)}, r"linears.3.bias is not part of the model"),
        (
            {"conformer.1.conformer_layers.0.self_attn.in_proj_weight": (16, 8)},
            "in_proj_weight is not part",
        ),
    ],
)
def test_differences_are_named(saved, change, message):
    path, tensors, model = saved
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape:
            tensors[name] = np.zeros(shape, np.float32)
    save_file(tensors, path)
    with pytest.raises(InputError, match=message):
        load_splitformer_checkpoint(path, model.config)


def test_another_preset_is_named(saved):
    path, _, _ = saved
    with pytest.raises(InputError, match=r"conformer_parallel.*is not part of the model.*preset"):
        load_splitformer_checkpoint(path, exit_config(branches="none"))


@pytest.mark.parametrize(
    ("field", "value"), [("front_end", "fixed"), ("head", "bilstm"), ("positions", "relative")]
)
def test_kinds_that_were_not_released(saved, field, value):
    path, _, _ = saved
    with pytest.raises(InputError, match=f"model.{field} is '{value}'"):
        load_splitformer_checkpoint(path, exit_config(**{field: value}))


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(InputError, match="is missing"):
        load_splitformer_checkpoint(tmp_path / "no.safetensors", exit_config())
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match=r"bad.safetensors is not a file of tensors"):
        load_splitformer_checkpoint(tmp_path / "bad.safetensors", exit_config())


def saved_by_torch(folder, config, branches):
    """The oracle with random weights, and our model from the file that PyTorch makes of it."""
    torch = pytest.importorskip("torch")
    from tests.support import torch_conformer

    torch.manual_seed(0)
    theirs = torch_conformer.EarlyExitConformer(config, branches)
    theirs = torch_conformer.randomize(theirs).eval()
    path = folder / "mod090-transformer.pt"
    torch.save(theirs.state_dict() | {"positional_encoder.pe": torch.zeros(20, 1, 8)}, path)
    return torch, theirs, load_splitformer_checkpoint(path, config)


def torch_features(torch, x, num_mels):
    from tests.support.torch_conformer import power_mel_spectrum

    return torch.from_numpy(np.float32(mel_matrix(num_mels))).T @ power_mel_spectrum(x)


def noise(t):
    return np.float32(0.1 * np.random.default_rng(0).normal(size=(2, t)))


@pytest.mark.parametrize("t", [3520, 960])  # 5 frames, and a single one
def test_logits_of_the_baseline_equal_torch(tmp_path, t):
    config = exit_config(branches="none", layers_per_exit=2)
    torch, theirs, model = saved_by_torch(tmp_path, config, [])
    x = noise(t)
    with torch.no_grad():
        want = theirs(torch_features(torch, torch.from_numpy(x), config.num_mels))
    got = nnx.jit(lambda model, x: model(x, jnp.full(2, t)).exit_logits)(model, x)
    for logits, exit in zip(got, want, strict=True):
        np.testing.assert_allclose(logits, exit.numpy(), atol=1e-4)


def test_loss_and_gradients_of_splitformer_equal_torch(tmp_path):
    config = exit_config(num_exits=2)
    torch, theirs, model = saved_by_torch(tmp_path, config, [0, 1])
    t, n = 3520, 5  # an odd number of frames
    x = noise(t)
    targets, target_lengths = np.array([[1, 2], [3, 0]]), np.array([2, 1])
    want = theirs(torch_features(torch, torch.from_numpy(x), config.num_mels))
    loss = sum(
        torch.nn.functional.ctc_loss(
            z.log_softmax(-1).transpose(0, 1),
            torch.from_numpy(targets),
            torch.tensor([n, n]),
            torch.from_numpy(target_lengths),
            reduction="sum",
        )
        for z in want
    )
    loss.backward()

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params):
        def total(params):
            out = nnx.merge(graphdef, params, rest)(x, jnp.array([t, t]))
            losses = exit_ctc_losses(out.exit_logits, out.lengths, targets, target_lengths)
            return jnp.sum(losses), out.exit_logits

        return jax.value_and_grad(total, has_aux=True)(params)

    (got_loss, logits), gradient = run(params)
    for got, exit in zip(logits, want, strict=True):
        np.testing.assert_allclose(got, exit.detach().numpy(), atol=1e-4)
    assert float(got_loss) == pytest.approx(loss.item(), rel=1e-5)
    # Gradients in the released layout, by the same table.
    mine = upstream_tensors(like_model(config, gradient, rest))
    for name, parameter in theirs.named_parameters():
        np.testing.assert_allclose(
            mine[name], parameter.grad.numpy(), rtol=1e-4, atol=1e-4, err_msg=name
        )


def like_model(config, params, rest):
    """A model that holds gradients where parameters are."""
    model = exit_model(**dataclasses.asdict(config) | {"spec_augment": config.spec_augment})
    nnx.update(model, params, rest)
    return model


def test_torch_and_safetensors_files_hold_the_same(saved, tmp_path):
    torch = pytest.importorskip("torch")
    path, _, model = saved
    tensors = {name: torch.from_numpy(tensor) for name, tensor in load_file(path).items()}
    torch.save(tensors, tmp_path / "model.pt")
    loaded = load_splitformer_checkpoint(tmp_path / "model.pt", model.config)
    for name, value in variables(loaded).items():
        np.testing.assert_array_equal(value, variables(model)[name], err_msg=name)
    assert reference.parameters(loaded).keys() == reference.parameters(model).keys()
