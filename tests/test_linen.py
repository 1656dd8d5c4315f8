"""Every mechanism in a plain Linen model gives what its NNX module gives, from the same arrays."""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from edgespeech import linen as es
from edgespeech import nn
from edgespeech.errors import InputError
from edgespeech.nn.rotary import KeysValues
from edgespeech.ops.features import SpecAugmentConfig
from tests.support.modules import randomize

D, H, N = 8, 2, 5
RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(2, N, D)))
LENGTHS = np.array([N, 3])
MASK = np.arange(N) < LENGTHS[:, None]
FRAMES = (X, LENGTHS)
AUDIO = np.float32(RNG.normal(size=(2, 2400))), np.array([2400, 1800])
MELS = np.float32(RNG.normal(size=(2, 12, 8))), np.array([12, 9])
PULSES = nn.LPAConfig(2, 0, 1, 1, kernel_size=3, local_kernel_size=3, num_basis=3)
CAUSAL = nn.LPAConfig(0, 1, 1, 0, 1, kernel_size=3, local_kernel_size=3)
MEMORY = KeysValues(*np.float32(RNG.normal(size=(2, 2, N, H, D // H))))

layer = functools.partial(nn.EncoderLayer, D, H, 12, norm_first=True, dropout_rate=0.0)


def conformer(rngs):
    return nn.ConformerLayer(D, H, 12, 3, dropout_rate=0.0, rngs=rngs)


def lpa_layer(rngs):
    """A mechanism with another one in its slot."""
    new = layer(rngs=rngs)
    new.mixer = nn.LPA(D, H, PULSES, rngs=rngs)
    return new


# Arguments and inputs of every mechanism that is made from numbers,
MECHANISMS = {
    "BiLSTMHead": ((D, 4, 3), FRAMES),
    "ConformerFeedForward": ((D, 12, 0.0), (X,)),
    "ConformerLayer": (
        {"d": D, "num_heads": H, "ffn_width": 12, "kernel_size": 3, "dropout_rate": 0.0},
        FRAMES,
    ),
    "ConvPositions": ((D, 3, 2), FRAMES),
    "ConvolutionModule": ((D, 3, 0.0, "batch"), (X, MASK)),
    "CrossAttention": ((D, H), (X, MEMORY, LENGTHS)),
    "DecoderLayer": ((D, H, 12, 2), (X, LENGTHS, X, LENGTHS)),
    "DualPathBlock": (
        {"d": D, "num_intra_layers": 1, "num_inter_layers": 1, "num_heads": H, "ffn_width": 12},
        (X.reshape(1, 2, N, D), np.array([2])),
    ),
    "EncoderLayer": (
        {"d": D, "num_heads": H, "ffn_width": 12, "norm_first": True, "dropout_rate": 0.0},
        FRAMES,
    ),
    "FeedForward": ((D, 12, 0.0), (X,)),
    "GatedFeedForward": ((D, 12), (X,)),
    "LPA": ((D, H, PULSES), FRAMES),
    "LinearHead": ((D, 4), FRAMES),
    "LogMelFrontEnd": ((D, 8, 2, 1, SpecAugmentConfig()), AUDIO),
    "LpLayerNorm": ((D,), (X,)),
    "MaskedNorm": ((D, "group"), (X, MASK)),
    "MelSubsampling": ((D, 8, "paper", SpecAugmentConfig()), AUDIO),
    "MoonshineFrontEnd": ((D,), AUDIO),
    "RelativeSelfAttention": ((D, H), FRAMES),
    "Removed": ((), FRAMES),
    "RotarySelfAttention": ((D, H, 2), FRAMES),
    "RotarySlidingWindowAttention": ((D, H, 2, 2), FRAMES),
    "SelfAttention": ((D, H), FRAMES),
    "SlidingWindowAttention": ((D, H, 2), FRAMES),
    "StreamingLPA": ((D, H, CAUSAL), FRAMES),
    "Subsampling": ({"num_mels": 8, "d": D, "separable": True}, MELS),
    "WaveformFrontEnd": ((D,), AUDIO),
}
# and of those that are made from other modules.
MADE_OF_MODULES = {
    "ChannelsFirstAttention": (
        lambda rngs: nn.ChannelsFirstAttention(nn.SelfAttention(D, H, rngs=rngs)),
        (X.swapaxes(1, 2)[:, :, None], LENGTHS),
    ),
    "ChannelsFirstFeedForward": (
        lambda rngs: nn.ChannelsFirstFeedForward(nn.FeedForward(D, 12, 0.0, rngs=rngs)),
        (X.swapaxes(1, 2)[:, :, None],),
    ),
    "ParallelBranch": (lambda rngs: nn.ParallelBranch(conformer(rngs), D), (X, X, LENGTHS)),
    "an LPA in a slot": (lpa_layer, FRAMES),
}


class Model(linen.Module):
    """A plain Linen model: a mechanism, and a dense layer on what comes out of it."""

    make: Callable

    @linen.compact
    def __call__(self, *inputs, **kwargs):
        out = self.make(name="mechanism")(*inputs, **kwargs)
        return linen.Dense(3, name="head")(first(out))


def first(out):
    """Of a front end's frames and lengths, or a block's output and hidden states, the first."""
    return out[0] if isinstance(out, tuple) else out


def compare(mechanism, make_linen, inputs, **kwargs):
    """Outputs, and gradients by every parameter and every float input, of both from the same arrays."""
    randomize(mechanism)
    graphdef, params, rest = nnx.split(mechanism, nnx.Param, ...)
    model = Model(make_linen)
    fresh = jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), *inputs)
    rng = np.random.default_rng(1)
    head = {
        name: np.float32(rng.normal(size=leaf.shape))
        for name, leaf in fresh["params"]["head"].items()
    }
    variables = {name: {"mechanism": tree} for name, tree in es.variables_of(mechanism).items()}
    variables.setdefault("params", {})["head"] = head
    kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), v) for v in (fresh, variables)]
    assert kinds[0] == kinds[1]
    is_float = [jax.tree.leaves(x)[0].dtype.kind == "f" for x in inputs]
    floats = [x for x, yes in zip(inputs, is_float, strict=True) if yes]

    def with_others(floats):
        left = list(floats)
        return [left.pop(0) if yes else x for x, yes in zip(inputs, is_float, strict=True)]

    def by_nnx(params, head, floats):
        module = nnx.merge(graphdef, params, rest, copy=True)
        out = first(module(*with_others(floats), **kwargs)) @ head["kernel"] + head["bias"]
        return jnp.sum(jnp.sin(out)), out

    def by_linen(linen_params, floats):
        given = {**variables, "params": linen_params}
        out = model.apply(given, *with_others(floats), **kwargs)
        return jnp.sum(jnp.sin(out)), out

    # Optimised code would take twice as long to compile as to do without.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(params, linen_params, floats):
        one = jax.grad(by_nnx, (0, 1, 2), has_aux=True)(params, linen_params["head"], floats)
        return one, jax.grad(by_linen, (0, 1), has_aux=True)(linen_params, floats)

    (grads, out), (linen_grads, linen_out) = both(params, variables["params"], floats)
    np.testing.assert_allclose(linen_out, out, atol=1e-6)
    assert np.ptp(out) > 0
    flat = {("mechanism", *path): leaf[...] for path, leaf in nnx.to_flat_state(grads[0])}
    want = {**nnx.traversals.unflatten_mapping(flat), "head": grads[1]}, grads[2]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), linen_grads, want)


@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism(name):
    given, inputs = MECHANISMS[name]
    args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
    nnx_class = getattr(nn, name)
    rngs = (
        {"rngs": nnx.Rngs(0)} if "rngs" in inspect.signature(nnx_class.__init__).parameters else {}
    )
    call = {"scan": False} if name == "DualPathBlock" else {}
    make_linen = functools.partial(getattr(es, name), *args, **kwargs)
    compare(nnx_class(*args, **kwargs, **rngs), make_linen, inputs, **call)


@pytest.mark.parametrize("name", MADE_OF_MODULES)
def test_made_of_modules(name):
    make, inputs = MADE_OF_MODULES[name]
    compare(make(nnx.Rngs(0)), functools.partial(es.to_linen, make), inputs)


def test_every_mechanism_is_tested():
    exported = [getattr(nn, name) for name in nn.__all__]
    modules = {x.__name__ for x in exported if inspect.isclass(x) and issubclass(x, nnx.Module)}
    assert modules == {*MECHANISMS, *MADE_OF_MODULES} - {"an LPA in a slot"}


class Encoder(linen.Module):
    """Two LPAs, one of them a layer down, made in `setup` as Linen code often does."""

    inference: bool = False

    def setup(self):
        self.mixer = es.LPA(D, H, PULSES, inference=self.inference)
        self.layer = es.to_linen(lpa_layer)

    def __call__(self, x, lengths):
        return self.layer(self.mixer(x, lengths), lengths)


def test_anneal_reaches_every_lpa():
    model = Encoder()
    variables = jax.jit(model.init)(jax.random.key(0), *FRAMES)
    # The NNX modules with the same arrays, annealed by their own function.
    mixer, layer = nn.LPA(D, H, PULSES, rngs=nnx.Rngs(1)), lpa_layer(nnx.Rngs(2))
    for name, module in (("mixer", mixer), ("layer", layer)):
        es.load_variables(module, {kind: tree[name] for kind, tree in variables.items()})
        nn.set_anneal(module, 0.25, 1.0)

    @jax.jit
    def every(variables):
        annealed = es.anneal(variables, 0.25, 1.0)
        hard = Encoder(inference=True).apply(annealed, *FRAMES)
        outputs = layer(mixer(*FRAMES), LENGTHS), model.apply(annealed, *FRAMES), hard
        return annealed["anneal"], [jnp.where(MASK[..., None], out, 0.0) for out in outputs]

    annealed, (want, got, hard) = every(variables)
    assert [float(x) for x in jax.tree.leaves(annealed)] == [1.0, 0.25] * 2
    np.testing.assert_allclose(got, want, atol=1e-5)
    # At strength 1 the gates are binary already: `inference` computes the same by comparisons.
    np.testing.assert_allclose(hard, got, atol=1e-5)


def test_streaming_steps_in_linen():
    model = es.StreamingLPA(D, H, CAUSAL)
    variables = jax.jit(model.init)(jax.random.key(0), *FRAMES)
    step = jax.jit(functools.partial(model.apply, nnx_method="step"))
    state, out = model.apply(variables, 2, nnx_method="init_state"), []
    want, _, _ = step(variables, *FRAMES, state)
    for i in range(N):
        y, _, state = step(variables, X[:, i : i + 1], np.int32(i < LENGTHS), state)
        out.append(y)
    got = np.concatenate(out, axis=1)
    np.testing.assert_allclose(got[MASK], want[MASK], atol=1e-5)


def test_running_statistics_are_batch_stats():
    model, norm = es.MaskedNorm(D, "batch"), nn.MaskedNorm(D, "batch")
    variables = model.init(jax.random.key(0), X, MASK)
    want = norm(X, MASK, training=True)
    got, updates = model.apply(variables, X, MASK, training=True, mutable=["batch_stats"])
    np.testing.assert_allclose(got, want, atol=1e-6)
    for name in ("running_mean", "running_variance"):
        np.testing.assert_allclose(
            updates["batch_stats"][name], getattr(norm, name)[...], atol=1e-6
        )
    assert np.abs(updates["batch_stats"]["running_mean"]).max() > 0.01


def test_errors():
    with pytest.raises(AttributeError, match="no Transformer"):
        _ = es.Transformer
    with pytest.raises(InputError, match="variables of params"):
        es.anneal({"params": {}}, 0.5)
    with pytest.raises(InputError, match="multiple of num_heads"):
        es.LPA(10, 3, PULSES).init(jax.random.key(0), X, LENGTHS)
