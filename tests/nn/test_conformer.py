"""The Conformer layer against float64 NumPy, against PyTorch with gradients, under padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.conformer import ConformerFeedForward, ConformerLayer, add_sinusoids
from edgespeech.nn.token_mixer_controls import Removed
from tests.nn.test_relative_attention import relative_attention, sinusoid
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.modules import randomize

D, H, WIDTH, K = 8, 2, 12, 5
LENGTHS = np.array([9, 6, 2, 1])  # even, odd, the shortest
call = nnx.jit(lambda module, x, lengths: module(x, lengths))
train = nnx.jit(lambda module, x, lengths, key: module(x, lengths, key))


def inputs(seed=1):
    return np.random.default_rng(seed).normal(size=(4, 9, D))


def make(conv_norm="batch", positions="absolute", dropout_rate=0.0, seed=0):
    layer = ConformerLayer(
        D,
        H,
        WIDTH,
        K,
        dropout_rate=dropout_rate,
        conv_norm=conv_norm,
        positions=positions,
        rngs=nnx.Rngs(seed),
    )
    if conv_norm == "batch":
        rng = np.random.default_rng(seed)
        norm = layer.conv.middle_norm
        norm.running_mean[...] = jnp.asarray(rng.normal(size=D), jnp.float32)
        norm.running_variance[...] = jnp.asarray(rng.uniform(0.5, 2.0, size=D), jnp.float32)
    return randomize(layer, seed)


def silu(x):
    return x * reference.sigmoid(x)


def feed_forward(w, x):
    y = reference.linear(
        reference.part(w, "expand"), reference.layer_norm(reference.part(w, "norm"), x)
    )
    return reference.linear(reference.part(w, "contract"), silu(y))


def conformer_layer(layer, x):
    """One utterance `[n d]` in inference, float64."""
    w = reference.parameters(layer)
    part = reference.part
    x = x + 0.5 * feed_forward(part(w, "ffn1"), x)
    y = reference.layer_norm(part(w, "mixer_norm"), x)
    attention = relative_attention if "mixer.content_bias" in w else reference.self_attention
    x = x + attention(part(w, "mixer"), y, H)
    conv = part(w, "conv")
    y = reference.linear(part(conv, "expand"), reference.layer_norm(part(conv, "norm"), x))
    y = y[:, :D] * reference.sigmoid(y[:, D:])
    y = reference.depthwise_conv(y, conv["depthwise"]) + conv["depthwise_bias"]
    norm = layer.conv.middle_norm
    if norm.kind == "batch":
        mean, variance = np.float64(norm.running_mean), np.float64(norm.running_variance)
    elif norm.kind == "group":
        mean, variance = y.mean(), y.var()
    else:
        mean, variance = y.mean(-1, keepdims=True), y.var(-1, keepdims=True)
    y = (y - mean) / np.sqrt(variance + 1e-5)
    y = silu(y * conv["middle_norm.scale"] + conv["middle_norm.bias"])
    x = x + reference.linear(part(conv, "contract"), y)
    x = x + 0.5 * feed_forward(part(w, "ffn2"), x)
    return reference.layer_norm(part(w, "norm"), x)


@pytest.mark.parametrize(
    ("conv_norm", "positions"),
    [("batch", "absolute"), ("group", "absolute"), ("layer", "relative")],
)
def test_layer(conv_norm, positions):
    layer, x = make(conv_norm, positions), inputs()
    out = padding_contract(
        lambda x, n: call(layer, x, n), np.float32(x), LENGTHS, rows=(1, 3), atol=2e-5
    )
    for row, n in enumerate(LENGTHS):
        want = conformer_layer(layer, x[row, :n])
        np.testing.assert_allclose(out[row, :n], want, atol=5e-5)


def test_slot_of_the_mixer():
    layer, x = make(), inputs()
    layer.mixer = Removed()
    got = call(layer, np.float32(x), LENGTHS)
    attention = make()
    for name in ("kernel", "bias"):
        getattr(attention.mixer.out_proj, name)[...] *= 0.0
    want = conformer_layer(attention, x[0])
    np.testing.assert_allclose(got[0], want, atol=5e-5)


def test_sinusoids_are_added():
    x = inputs()
    want = x[0] + np.stack([sinusoid(p, D) for p in range(9)])
    np.testing.assert_allclose(add_sinusoids(jnp.float32(x))[0], want, atol=1e-5)


def test_training_ignores_padding():
    x, key = inputs(), jax.random.key(0)
    mask = np.arange(9) < LENGTHS[:, None]

    @jax.jit
    def gradient(params, rest, x):
        def loss(params):
            layer = nnx.merge(graphdef, params, rest, copy=True)
            y = jnp.where(mask[..., None], layer(x, LENGTHS, key), 0.0)
            return jnp.sum(y * jnp.cos(jnp.arange(D))), nnx.state(layer, nnx.BatchStat)

        return jax.grad(loss, has_aux=True)(params)

    graphdef, params, rest = nnx.split(make(), nnx.Param, ...)
    want, want_rest = gradient(params, rest, np.float32(x))
    got, got_rest = gradient(params, rest, np.float32(np.where(mask[..., None], x, np.nan)))
    for a, b in ((want, got), (want_rest, got_rest)):
        a, b = reference.parameters_of_state(a), reference.parameters_of_state(b)
        for name, value in a.items():
            assert np.isfinite(value).all(), name
            np.testing.assert_array_equal(b[name], value, err_msg=name)
    moved = reference.parameters_of_state(want_rest)["conv.middle_norm.running_mean"]
    assert np.abs(moved - np.asarray(make().conv.middle_norm.running_mean)).max() > 1e-3


def test_dropout_needs_a_key():
    x, lengths = jax.random.normal(jax.random.key(2), (2, 400, D)), np.array([400, 400])
    layer = make("layer", dropout_rate=0.4)
    a, b, other = (train(layer, x, lengths, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - other).max() > 0.1
    assert np.abs(a - call(layer, x, lengths)).max() > 0.1
    ffn = randomize(ConformerFeedForward(D, WIDTH, 0.25, rngs=nnx.Rngs(0)))
    dropped = nnx.jit(lambda ffn, x, key: ffn(x, key))(ffn, x, jax.random.key(0)) == 0
    assert dropped.mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("size", [4, 0])
def test_even_kernels_are_refused(size):
    with pytest.raises(InputError, match=f"is {size}: it must be odd"):
        ConformerLayer(D, H, WIDTH, size, dropout_rate=0.0, rngs=nnx.Rngs(0))


def test_positions_are_named():
    with pytest.raises(InputError, match="'rotary': choose absolute, relative"):
        ConformerLayer(D, H, WIDTH, K, dropout_rate=0.0, positions="rotary", rngs=nnx.Rngs(0))


# ------------------------------------------------------------------------------------- PyTorch


def torch_modules():
    """Classes `(d, heads, width, kernel, norm) -> layer [b n d]`: ours from the papers, torchaudio's if it loads."""
    torch = pytest.importorskip("torch")
    from tests.support import torch_conformer

    builders = {"papers": torch_conformer.Layer}
    try:
        from torchaudio.models.conformer import ConformerLayer as Upstream
    except (ImportError, OSError):  # absent, or built for another torch
        return torch, torch_conformer, builders

    class Torchaudio(torch.nn.Module):
        def __init__(self, d, heads, width, kernel, norm):
            super().__init__()
            self.layer = Upstream(d, width, heads, kernel, 0.0, norm == "group")

        def forward(self, x):
            return self.layer(x.transpose(0, 1), None).transpose(0, 1)

        def state_dict(self, **_):
            return self.layer.state_dict()

        def named_parameters(self, **_):
            return self.layer.named_parameters()

    return torch, torch_conformer, builders | {"torchaudio": Torchaudio}


def from_torch(tensors, layer):
    """Gives a layer the tensors of PyTorch's; returns our name -> (theirs, rows of a third or None)."""
    linears = {
        "ffn1.norm": "ffn1.sequential.0",
        "ffn1.expand": "ffn1.sequential.1",
        "ffn1.contract": "ffn1.sequential.4",
        "mixer_norm": "self_attn_layer_norm",
        "mixer.out_proj": "self_attn.out_proj",
        "conv.norm": "conv_module.layer_norm",
        "conv.expand": "conv_module.sequential.0",
        "conv.middle_norm": "conv_module.sequential.3",
        "conv.contract": "conv_module.sequential.5",
        "ffn2.norm": "ffn2.sequential.0",
        "ffn2.expand": "ffn2.sequential.1",
        "ffn2.contract": "ffn2.sequential.4",
        "norm": "final_layer_norm",
    }
    table = {
        "conv.depthwise": ("conv_module.sequential.2.weight", None),
        "conv.depthwise_bias": ("conv_module.sequential.2.bias", None),
    }
    for ours, theirs in linears.items():
        gain = "scale" if ours.endswith("norm") else "kernel"
        table[f"{ours}.{gain}"] = (f"{theirs}.weight", None)
        table[f"{ours}.bias"] = (f"{theirs}.bias", None)
    for third, name in enumerate("qkv"):
        rows = slice(third * D, (third + 1) * D)
        table[f"mixer.{name}_proj.kernel"] = ("self_attn.in_proj_weight", rows)
        table[f"mixer.{name}_proj.bias"] = ("self_attn.in_proj_bias", rows)
    params = {".".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(layer, nnx.Param))}
    assert params.keys() == table.keys()
    for ours, param in params.items():
        param[...] = jnp.asarray(like_ours(tensors, table[ours], param.shape))
    return table


def like_ours(tensors, source, shape):
    name, rows = source
    tensor = tensors[name] if rows is None else tensors[name][rows]
    return np.asarray(tensor).T.reshape(shape)


@pytest.mark.parametrize("oracle", ["papers", "torchaudio"])
@pytest.mark.parametrize(("norm", "training"), [("batch", False), ("batch", True), ("group", True)])
def test_parity_with_torch(oracle, norm, training):
    torch, support, builders = torch_modules()
    if oracle not in builders:
        pytest.skip("torchaudio cannot be imported")
    torch.manual_seed(0)
    theirs = support.randomize(builders[oracle](D, H, WIDTH, K, norm)).train(training)
    layer = make(norm)
    before = {k: v.detach().numpy().copy() for k, v in theirs.state_dict().items()}
    table = from_torch(before, layer)
    if norm == "batch":
        running = layer.conv.middle_norm
        running.running_mean[...] = jnp.asarray(before["conv_module.sequential.3.running_mean"])
        running.running_variance[...] = jnp.asarray(before["conv_module.sequential.3.running_var"])
    x = np.float32(inputs())
    weight = np.cos(np.arange(x.size)).reshape(x.shape).astype(np.float32)

    y = theirs(torch.from_numpy(x))
    (y * torch.from_numpy(weight)).sum().backward()

    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    key = jax.random.key(0) if training else None

    @jax.jit
    def run(params):
        def loss(params):
            layer = nnx.merge(graphdef, params, rest, copy=True)
            y = layer(x, jnp.full(len(x), x.shape[1]), key)
            return jnp.sum(y * weight), (y, nnx.state(layer, nnx.BatchStat))

        return jax.grad(loss, has_aux=True)(params)

    gradient, (got, statistics) = run(params)
    np.testing.assert_allclose(got, y.detach().numpy(), atol=1e-5)
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    for name, value in reference.parameters_of_state(gradient).items():
        want = like_ours(gradients, table[name], value.shape)
        np.testing.assert_allclose(value, want, atol=1e-4, err_msg=name)
    after = theirs.state_dict()
    for name, value in reference.parameters_of_state(statistics).items():
        upstream = "running_mean" if name.endswith("mean") else "running_var"
        want = after[f"conv_module.sequential.3.{upstream}"].numpy()
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6, err_msg=name)
