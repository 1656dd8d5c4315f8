"""SpeechBrain's SepFormer with the same weights: masks, estimates, loss and gradients agree."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.evaluation.latency_sepformer import importable_torchaudio
from edgespeech.interop import speechbrain_sepformer
from edgespeech.interop.speechbrain_sepformer import (
    FILES,
    load_speechbrain_sepformer,
    speechbrain_names,
)
from edgespeech.interop.tensors import named_params
from edgespeech.models.sepformer import SepFormer
from edgespeech.ops.sisnr import si_snr_loss
from tests.support.sepformer import SMALL

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "speechbrain_sepformer.npz")


def of(kind):
    """The golden file's arrays of a kind, by SpeechBrain's names."""
    return {k.removeprefix(kind): GOLDEN[k] for k in GOLDEN.files if k.startswith(kind)}


def assert_step(ours, config, mix, targets, wanted, gradients):
    """Masks, estimates, loss and gradients are theirs."""
    ours.mask_network.scan_layers = True
    graphdef, params = nnx.split(ours)
    lengths = jnp.full(len(mix), mix.shape[1])

    def objective(params):
        out = nnx.merge(graphdef, params)(mix, lengths)
        return si_snr_loss(out.estimates, targets, lengths, threshold=-1000.0), out

    (value, out), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    np.testing.assert_allclose(out.masks, wanted["masks"], atol=1e-4)
    np.testing.assert_allclose(out.estimates, wanted["estimates"], atol=1e-4)
    assert np.abs(out.estimates).max() > 0.1
    assert value == pytest.approx(float(wanted["loss"]), abs=1e-4)
    table = speechbrain_names(config)
    assert len(nnx.to_flat_state(gradient)) == len(gradients)
    for path, leaf in nnx.to_flat_state(gradient):
        name = ".".join(map(str, path))
        want = gradients[table[name]]
        np.testing.assert_allclose(
            np.asarray(leaf[...]).T, want, atol=1e-4 * max(1.0, np.abs(want).max()), err_msg=name
        )


def test_golden(tmp_path, monkeypatch):
    """Without PyTorch at hand: two voices, so that the loss permutes."""
    files = {name: {} for name in FILES}
    for name, tensor in of("tensors/").items():
        file, key = name.split(".", 1)
        files[file][key] = tensor
        (tmp_path / f"{file}.ckpt").touch()
    monkeypatch.setattr(speechbrain_sepformer, "read_weights", lambda path: files[path.stem])
    config = dataclasses.replace(SMALL, num_speakers=2)
    ours = load_speechbrain_sepformer(tmp_path, config)
    assert_step(ours, config, GOLDEN["mix"], GOLDEN["targets"], GOLDEN, of("gradients/"))


# ------------------------------------------------------------------------------- against PyTorch


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def make(torch):
    from tests.golden import make_speechbrain_sepformer

    return make_speechbrain_sepformer


@pytest.fixture(scope="module")
def peer():
    """SpeechBrain's loss."""
    with importable_torchaudio():
        pytest.importorskip("speechbrain", exc_type=ImportError)
        from speechbrain.nnet.losses import get_si_snr_with_pitwrapper
    yield get_si_snr_with_pitwrapper
    # Its lazy modules raise on any look at them, and other tests' libraries look at every module that is loaded.
    for name in [name for name in sys.modules if name.split(".")[0] == "speechbrain"]:
        del sys.modules[name]


def save(torch, model, folder):
    for name in ("encoder", "masknet", "decoder"):
        torch.save(getattr(model, name).state_dict(), folder / f"{name}.ckpt")
    return folder


@pytest.mark.parametrize("speakers", [1, 2])
def test_masks_estimates_loss_and_gradients(torch, make, peer, tmp_path, speakers):
    config = dataclasses.replace(SMALL, num_speakers=speakers)
    theirs = make.random_model(config)
    ours = load_speechbrain_sepformer(save(torch, theirs, tmp_path), config)
    mix, targets = make.two_voices(speakers)
    wanted = make.training_step(theirs, peer, mix, targets)
    gradients = {k[10:]: v for k, v in wanted.items() if k.startswith("gradients/")}
    assert_step(ours, config, mix, targets, wanted, gradients)


def test_loss_drops_what_is_better_than_the_threshold(torch, peer):
    their_loss = peer
    rng = np.random.default_rng(2)
    targets = np.float32(rng.normal(size=(3, 1, 50)))
    noise = np.float32(rng.normal(size=(3, 1, 50))) * np.float32([1.0, 0.3, 0.001])[:, None, None]
    losses = their_loss(
        torch.tensor(targets).transpose(1, 2).clone(),
        torch.tensor(targets + noise).transpose(1, 2).clone(),
    )
    kept = losses[losses > -30]
    assert len(kept) == 2
    got = si_snr_loss(targets + noise, targets, jnp.full(3, 50))
    assert got == pytest.approx(kept.mean().item(), abs=1e-4)


@pytest.mark.usefixtures("peer")
def test_other_lengths_equal_theirs_on_the_completed_audio(torch, make, tmp_path):
    theirs = make.random_model(SMALL)
    ours = load_speechbrain_sepformer(save(torch, theirs, tmp_path), SMALL)
    ours.mask_network.scan_layers = True
    more = 3
    t = 8 + 4 * 20 + more
    mix = np.float32(np.random.default_rng(3).normal(size=(1, t)))
    completed = np.pad(mix, ((0, 0), (0, 4 - more)))
    with torch.no_grad():
        want = theirs(torch.tensor(completed)).numpy()[:, :t, 0]
        silent = theirs(torch.tensor(mix)).numpy()[0, t - more :, 0]
    got = np.asarray(nnx.jit(lambda model: model(mix, np.array([t])).estimates[:, 0])(ours))
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_array_equal(silent, 0.0)  # the named difference
    assert np.abs(got[0, t - more :]).max() > 1e-3


# ------------------------------------------------------------------------------ without the peer


def synthetic_folder(torch, folder):
    """A folder of the published layout with random weights, made from names and shapes alone."""
    template = nnx.eval_shape(lambda: SepFormer(SMALL, rngs=nnx.Rngs(0)))
    rng, files = np.random.default_rng(4), {"encoder": {}, "masknet": {}, "decoder": {}}
    fused: dict[str, dict] = {}
    for name, param in named_params(template).items():
        file, key = speechbrain_names(SMALL)[name].split(".", 1)
        tensor = torch.tensor(np.float32(rng.normal(size=param.shape[::-1])))
        if projection := re.fullmatch(r"(.*att)\.([qkv])_proj\.(weight|bias)", key):
            stem, part, kind = projection.groups()
            fused.setdefault(f"{stem}.in_proj_{kind}", {})[part] = tensor
        else:
            files[file][key] = tensor
    for key, parts in fused.items():
        files["masknet"][key] = torch.cat([parts[part] for part in "qkv"])
    files["masknet"]["dual_mdl.0.intra_mdl.pos_enc.pe"] = torch.zeros(1, 2500, SMALL.width)
    for name, state in files.items():
        torch.save(state, folder / f"{name}.ckpt")
    return files


def test_layout_of_the_published_files(torch, tmp_path):
    files = synthetic_folder(torch, tmp_path)
    model = load_speechbrain_sepformer(tmp_path, SMALL)
    layer = model.mask_network.blocks[1].intra.layers[1]
    weight = files["masknet"]["dual_mdl.1.intra_mdl.mdl.layers.1.self_att.att.in_proj_weight"]
    np.testing.assert_array_equal(layer.mixer.k_proj.kernel[...], weight[16:32].T)
    bias = files["masknet"]["dual_mdl.1.intra_mdl.mdl.layers.1.self_att.att.in_proj_bias"]
    np.testing.assert_array_equal(layer.mixer.v_proj.bias[...], bias[32:])
    np.testing.assert_array_equal(model.decoder[:, 0], files["decoder"]["weight"][:, 0].T)
    np.testing.assert_array_equal(
        model.mask_network.blocks[0].inter_norm.scale[...],
        files["masknet"]["dual_mdl.0.inter_norm.weight"],
    )


def test_a_folder_of_another_model_is_refused(torch, tmp_path):
    synthetic_folder(torch, tmp_path)
    with pytest.raises(InputError, match=r"dual_mdl.1.inter.*is not part of the model"):
        load_speechbrain_sepformer(tmp_path, dataclasses.replace(SMALL, num_blocks=1))
    with pytest.raises(
        InputError, match=r"conv2d.weight has shape \[16, 16\] instead of \[32, 16\]"
    ):
        load_speechbrain_sepformer(tmp_path, dataclasses.replace(SMALL, num_speakers=2))


def test_damaged_or_missing_files_are_named(torch, tmp_path):
    synthetic_folder(torch, tmp_path)
    (tmp_path / "decoder.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"decoder.ckpt is not a file of tensors"):
        load_speechbrain_sepformer(tmp_path, SMALL)
    (tmp_path / "decoder.ckpt").unlink()
    with pytest.raises(InputError, match=r"decoder.ckpt is missing"):
        load_speechbrain_sepformer(tmp_path, SMALL)


def test_code_in_a_file_is_not_run(torch, tmp_path):
    synthetic_folder(torch, tmp_path)
    torch.save({"weight": print}, tmp_path / "decoder.ckpt")
    with pytest.raises(InputError, match=r"decoder.ckpt is not a file of tensors alone"):
        load_speechbrain_sepformer(tmp_path, SMALL)
