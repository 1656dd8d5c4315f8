"""LPA against a float64 layer built from the equation, and the contracts of a token mixer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA, Anneal, LPAConfig, harden, set_anneal
from edgespeech.ops import accumulate, pulse
from edgespeech.ops.relative import relative_average_reference
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.modules import randomize
from tests.support.reference import depthwise_conv, parameters, parameters_of_state, sigmoid

D, H, N = 12, 3, 7
SMALL = LPAConfig(
    aperiodic=3,
    runs=2,
    periodic=2,
    positional=2,
    mean=1,
    octaves=1,
    taps=1,
    kernel_size=3,
    local_kernel_size=5,
    max_period=16.0,
    num_basis=4,
)
PRESETS = (
    "default",
    "mean_only",
    "local_only",
    "aperiodic_only",
    "runs_only",
    "periodic_only",
    "positional_only",
    "windows",
    "windows_only",
)

# One compilation instead of one an operation.
jitted = nnx.jit(lambda lpa, x, lengths: lpa(x, lengths))
gates_of = nnx.jit(lambda lpa, x, lengths: lpa.gates(x, lengths))


def call(lpa, x, lengths):
    return np.asarray(jitted(lpa, x, lengths))


def random_lpa(config, seed=0, **kwargs):
    """An LPA whose every parameter is random, so that no term of the equation is silent."""
    return randomize(LPA(D, H, config, rngs=nnx.Rngs(seed), **kwargs), seed)


def inputs(n=N, lengths=(N, 4, 1), seed=1):
    x = np.random.default_rng(seed).normal(size=(len(lengths), n, D))
    return np.float32(x), np.array(lengths)


def lpa_reference(w, config, x, progress, hard):
    """The equation for one utterance `[n d]` without padding, in float64."""
    n, d = x.shape
    c = d // H
    tau_rectangle, tau = 8.0 * (0.25 / 8.0) ** progress, 0.02**progress
    mask = np.ones((1, n), bool)
    u = np.arange(n) / (n - 1) if n > 1 else np.zeros(1)
    v = x @ w["v_proj.kernel"] + w["v_proj.bias"]
    heads = v.reshape(n, H, c).transpose(1, 0, 2)[None]
    z = depthwise_conv(x, w["content_kernel"])
    y = np.zeros((H, n, c))
    kinds = []
    if config.aperiodic:
        center, width = np.zeros((2, 1, H, config.aperiodic))
        for h, p in np.ndindex(H, config.aperiodic):
            rho = sigmoid(z @ w["rho_kernel"][:, h, p] + w["rho_bias"][h, p])
            pool = lambda f, rho=rho: np.sum(rho * f) / (np.sum(rho) + 1e-6)  # noqa: E731
            place = w["anchor"][h, p] + pool(u) - 0.5
            center[0, h, p] = np.clip(place, 0, 1) * (n - 1)
            score = pool(z @ w["width_kernel"][:, h, p]) + w["width_bias"][h, p]
            least = config.min_width
            width[0, h, p] = least + (max(n, least) - least) * sigmoid(score)
        kinds.append(pulse.rectangle_gates_reference(center, width, mask, tau_rectangle, hard))
    if config.runs:
        logit = np.einsum("nd,dhp->hpn", z, w["run_kernel"]) + w["run_bias"][..., None]
        kinds.append(pulse.run_gates_reference(logit[None], mask, tau, hard))
    if config.periodic:
        period = pulse.log_spaced_periods(H, config.periodic, config.max_period)
        duty = sigmoid(w["duty_logit"])
        kinds.append(pulse.periodic_gates_reference(period, w["phase"], duty, mask, tau, hard))
    if config.positional:
        kinds.append(
            pulse.positional_gates_reference(w["cosine"], w["cosine_bias"], [n], n, tau, hard)
        )
    if config.mean:
        kinds.append(np.ones((1, H, config.mean, n)))
    first = 0
    for index, gates in enumerate(kinds):
        last = first + gates.shape[2]
        alpha = w["alpha"][:, first:last, None] * np.ones(n)
        if config.readout == "content":
            score = np.einsum("nd,dhp->hpn", z, w["readout_kernel"][:, :, first:last])
            alpha = alpha * (1 + np.tanh(score + w["readout_bias"][:, first:last, None]))
        if config.runs and index == 1:
            means = accumulate.run_average_reference(gates, heads)[0]
        else:
            means = accumulate.pulse_average_reference(gates, heads)[0][:, :, None]
        y += np.sum((alpha * gates[0])[..., None] * means, axis=1)
        first = last
    if config.octaves:
        scores = np.einsum("nd,dhk->nhk", z, w["relative.kernel"]) + w["relative.bias"]
        salience = 2 * np.tanh(z @ w["relative.salience"] / 2)
        seen = heads.transpose(0, 2, 1, 3), scores[None], salience[None], mask
        near = relative_average_reference(*seen, config.taps, config.octaves)
        y += near[0].transpose(1, 0, 2)
    if config.local:
        local = depthwise_conv(v, w["local_kernel"]).reshape(n, H, c).transpose(1, 0, 2)
        y += w["local_scale"][:, None, None] * local
    return y.transpose(1, 0, 2).reshape(n, d) @ w["out_proj.kernel"] + w["out_proj.bias"]


@pytest.mark.parametrize("readout", ["static", "content"])
@pytest.mark.parametrize(("progress", "hard"), [(0.0, 0.0), (0.4, 0.5), (1.0, 1.0)])
def test_matches_the_equation(readout, progress, hard):
    config = dataclasses.replace(SMALL, readout=readout)
    lpa = random_lpa(config)
    set_anneal(lpa, progress, hard)
    x, lengths = inputs()
    got = call(lpa, x, lengths)
    for row, length in enumerate(np.asarray(lengths)):
        alone = np.float64(x[row, :length])
        want = lpa_reference(parameters(lpa), config, alone, progress, hard)
        np.testing.assert_allclose(got[row, :length], want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("readout", ["static", "content"])
def test_gradient_matches_the_equation(readout):
    config = dataclasses.replace(SMALL, readout=readout)
    lpa = random_lpa(config)
    set_anneal(lpa, 0.2)
    x, _ = inputs(5, (5,))
    rng = np.random.default_rng(7)
    weight = rng.normal(size=(5, D))
    graphdef, params, rest = nnx.split(lpa, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(params_and_x):
        params, x = params_and_x
        out = nnx.merge(graphdef, params, rest, copy=True)(x, jnp.array([5]))
        return jnp.sum(np.float32(weight) * out[0])

    grads, x_grad = gradient((params, x))
    got = parameters_of_state(grads)
    w, x64, eps = parameters(lpa), np.float64(x[0]), 1e-5
    assert set(got) == set(w)

    def difference(change_w, change_x):
        ends = []
        for s in (eps, -eps):
            moved = w | {k: w[k] + s * v for k, v in change_w.items()}
            ends.append(np.sum(weight * lpa_reference(moved, config, x64 + s * change_x, 0.2, 0.0)))
        return (ends[0] - ends[1]) / (2 * eps)

    for name, grad in got.items():
        direction = rng.normal(size=grad.shape)
        want = difference({name: direction}, 0.0)
        assert np.sum(grad * direction) == pytest.approx(want, rel=1e-3, abs=1e-3), name
    direction = rng.normal(size=x64.shape)
    assert np.sum(np.float64(x_grad[0]) * direction) == pytest.approx(
        difference({}, direction), rel=1e-3, abs=1e-3
    )


# Every kind of pulse at once: each weighs in the output, so that none can hide. Without content
# gates, as in local_only, the path to the output is another.
@pytest.mark.parametrize(
    ("config", "inference"),
    [(SMALL, False), (SMALL, True), (LPAConfig.local_only(), False)],
    ids=["soft", "binary", "local"],
)
def test_padding_and_neighbours_change_nothing(config, inference):
    lpa = random_lpa(config)
    set_anneal(lpa, 0.5)
    if inference:
        harden(lpa)
    out = padding_contract(lambda x, lengths: call(lpa, x, lengths), *inputs(), rows=(1,))
    assert np.isfinite(out).all()


def test_gradient_ignores_padding():
    lpa = random_lpa(SMALL)
    x, lengths = inputs(4, (4, 3, 1))
    mask = np.arange(4)[None, :, None] < lengths[:, None, None]

    @nnx.jit
    def gradient(lpa, x):
        def loss(lpa, x):
            return jnp.sum(jnp.where(mask, lpa(x, lengths), 0.0) ** 2)

        return nnx.grad(loss, argnums=(0, 1))(lpa, x)

    params, x_grad = gradient(lpa, x)
    spoiled, x_spoiled = gradient(lpa, np.where(mask, x, np.float32(np.nan)))
    jax.tree.map(np.testing.assert_array_equal, params, spoiled)
    np.testing.assert_array_equal(x_grad, x_spoiled)
    np.testing.assert_array_equal(np.where(mask, 0.0, x_grad), 0.0)


def test_hardened_equals_hard_one():
    lpa, (x, lengths) = random_lpa(SMALL), inputs()
    set_anneal(lpa, 0.3, 1.0)
    want, gates = call(lpa, x, lengths), gates_of(lpa, x, lengths)
    assert harden(lpa) is lpa
    for kind, gate in gates_of(lpa, x, lengths).items():
        np.testing.assert_array_equal(gate, gates[kind])
        assert set(np.unique(gate)) <= {0.0, 1.0}
    np.testing.assert_allclose(call(lpa, x, lengths), want, atol=5e-6)


def test_softer_gates_are_further_from_the_binary_output():
    lpa, (x, lengths) = random_lpa(SMALL), inputs()
    set_anneal(lpa, 1.0, 1.0)
    target, gaps = call(lpa, x, lengths), []
    for progress in (0.0, 0.5, 1.0):
        set_anneal(lpa, progress)
        gaps.append(float(np.mean((call(lpa, x, lengths) - target)[0] ** 2)))
    assert gaps[0] > gaps[1] > gaps[2]


def test_annealing_does_not_recompile_and_is_not_trained():
    lpa, (x, lengths) = random_lpa(SMALL), inputs()
    traces = []

    @nnx.jit
    def counted(lpa, x):
        traces.append(1)
        return lpa(x, lengths)

    outputs = []
    for progress in (0.0, 0.5, 1.0):
        set_anneal(lpa, progress, progress)
        outputs.append(counted(lpa, x))
    assert len(traces) == 1
    assert np.abs(np.asarray(outputs[0]) - np.asarray(outputs[2])).max() > 1e-3
    paths = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(lpa, Anneal))}
    assert paths == {"progress", "hard"}
    assert not paths & {path[-1] for path, _ in nnx.to_flat_state(nnx.state(lpa, nnx.Param))}


def test_vmap_over_stacked_layers_equals_the_loop():
    layers = [random_lpa(SMALL, seed) for seed in range(2)]
    for index, lpa in enumerate(layers):
        set_anneal(lpa, index / 2)
    xs = np.stack([inputs(3, (3, 2), seed)[0] for seed in range(2)])
    lengths = jnp.array([3, 2])
    graphdef = nnx.split(layers[0])[0]
    states = jax.tree.map(lambda *leaves: np.stack(leaves), *(nnx.state(lpa) for lpa in layers))

    def loss(state, x):
        out = nnx.merge(graphdef, state, copy=True)(x, lengths)
        return jnp.sum(out[0] ** 2), out

    both = jax.value_and_grad(loss, has_aux=True)
    (_, outs), grads = jax.jit(jax.vmap(both))(states, xs)
    one = jax.jit(both)
    for index, lpa in enumerate(layers):
        (_, out), grad = one(nnx.state(lpa), xs[index])
        np.testing.assert_allclose(outs[index], out, atol=1e-5)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(grad), strict=True)
        for stacked, single in pairs:
            np.testing.assert_allclose(stacked[index], single, atol=2e-3, rtol=1e-4)


def test_set_anneal_reaches_stacked_layers():
    graphdef, state = nnx.split(LPA(D, H, SMALL, rngs=nnx.Rngs(0)))
    stacked = nnx.merge(graphdef, jax.tree.map(lambda leaf: np.stack([leaf] * 5), state))
    set_anneal(nnx.List([stacked]), 0.25, 0.75)
    np.testing.assert_array_equal(stacked.progress[...], np.full(5, 0.25))
    np.testing.assert_array_equal(stacked.hard[...], np.full(5, 0.75))


def test_from_attention_copies_values_and_output():
    attention = SelfAttention(D, H, rngs=nnx.Rngs(3))
    lpa = LPA.from_attention(attention, SMALL, rngs=nnx.Rngs(4))
    for name in ("v_proj", "out_proj"):
        for part in ("kernel", "bias"):
            old = getattr(getattr(attention, name), part)[...]
            new = getattr(getattr(lpa, name), part)[...]
            np.testing.assert_array_equal(new, old)
            assert new.unsafe_buffer_pointer() != old.unsafe_buffer_pointer()
    assert lpa.num_heads == H


def smooth_inputs(n, d=48):
    """Frames whose neighbours correlate by 0.9, as neighbouring encoder frames do."""
    noise = np.random.default_rng(8).normal(size=(4, n, d))
    x = noise.copy()
    for i in range(1, n):
        x[:, i] = 0.9 * x[:, i - 1] + 0.19**0.5 * noise[:, i]
    return np.float32(x)


@pytest.mark.parametrize("preset", PRESETS)
def test_starts_on_the_scale_of_attention(preset):
    attention = SelfAttention(48, 4, rngs=nnx.Rngs(5))
    lpa = LPA.from_attention(attention, getattr(LPAConfig, preset)(), rngs=nnx.Rngs(6))
    x, lengths = smooth_inputs(32), np.full(4, 32)
    assert 0.5 < call(lpa, x, lengths).std() / call(attention, x, lengths).std() < 2.5


def test_start_places_rectangles_over_the_utterance():
    lpa = LPA(48, 4, LPAConfig(), rngs=nnx.Rngs(9))
    harden(lpa)
    gates = np.asarray(gates_of(lpa, smooth_inputs(75), np.full(4, 75))["aperiodic"])
    frames = np.arange(75)
    middle = (gates * frames).sum(-1) / gates.sum(-1)
    # Narrow ones (last head) stay near their anchors, ordered in time; widths fall over the heads.
    np.testing.assert_allclose(middle[:, 3].mean(0), (np.arange(8) + 0.5) / 8 * 74, atol=4)
    size = gates.sum(-1).mean((0, 2))
    assert size[0] > 2 * size[1] > 4 * size[2] / 2 > size[3] > 2


def test_content_readout_starts_equal_to_static():
    x, lengths = inputs()
    static = LPA(D, H, SMALL, rngs=nnx.Rngs(0))
    content = LPA(D, H, dataclasses.replace(SMALL, readout="content"), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(call(static, x, lengths), call(content, x, lengths), atol=5e-7)


def test_mean_only_is_the_mean_over_the_utterance():
    lpa = LPA(D, H, dataclasses.replace(LPAConfig.mean_only(), local=False), rngs=nnx.Rngs(0))
    x, lengths = inputs()
    w = parameters(lpa)
    values = reference.linear(reference.part(w, "v_proj"), np.float64(x[1, :4]))
    want = reference.linear(reference.part(w, "out_proj"), values.mean(0))
    np.testing.assert_allclose(call(lpa, x, lengths)[1, :4], np.tile(want, (4, 1)), atol=1e-5)


def test_gates_by_kind():
    lpa, (x, lengths) = random_lpa(SMALL), inputs()
    gates = gates_of(lpa, x, lengths)
    assert {kind: gate.shape[2] for kind, gate in gates.items()} == {
        "aperiodic": 3,
        "runs": 2,
        "periodic": 2,
        "positional": 2,
        "mean": 1,
    }
    valid = np.arange(N) < np.asarray(lengths)[:, None]
    for gate in gates.values():
        assert gate.dtype == jnp.float32
        assert np.where(valid[:, None, None], 0.0, gate).max() == 0.0
    np.testing.assert_array_equal(gates["mean"][:, 0, 0], valid)


def test_bfloat16_stays_close_and_keeps_float32_gates():
    lpa = random_lpa(SMALL)
    low = random_lpa(SMALL, dtype=jnp.bfloat16)
    x, lengths = inputs()
    out = call(low, x, lengths)
    assert out.dtype == jnp.bfloat16
    want = np.asarray(call(lpa, x, lengths))
    assert np.abs(np.float32(out)[0] - want[0]).max() < 0.03 * np.abs(want[0]).max()
    gates = nnx.eval_shape(lambda: low.gates(jnp.asarray(x), jnp.asarray(lengths)))
    assert {gate.dtype for gate in gates.values()} == {jnp.dtype("float32")}


def test_parameter_count_at_wav2vec2_base_size():
    d, h, k = 768, 12, 15
    projections = 2 * (d * d + d)
    rectangles = h * 8 * (2 * d + 3)  # two linear maps, two biases, the anchor
    periodic = h * 4 * 2
    positional = h * 4 * (16 + 1)
    readout = h * 16
    local = k * d + h
    want = projections + k * d + rectangles + periodic + positional + readout + local
    lpa = nnx.eval_shape(lambda: LPA(d, h, LPAConfig.default(), rngs=nnx.Rngs(0)))
    params = jax.tree.leaves(nnx.state(lpa, nnx.Param))
    assert sum(int(np.prod(p.shape)) for p in params) == want == 1_353_084


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_sixteen_pulses(preset):
    config = getattr(LPAConfig, preset)()
    assert config.num_pulses == (0 if preset in ("local_only", "windows_only") else 16)
    assert config.octaves == (4 if preset.startswith("windows") else 0)
    if preset not in ("default", "local_only", "windows", "windows_only"):
        assert getattr(config, preset.removesuffix("_only")) == 16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("aperiodic", -1),
        ("runs", -2),
        ("kernel_size", 14),
        ("local_kernel_size", 0),
        ("min_width", 0.5),
        ("max_period", 1.0),
        ("num_basis", 0),
        ("readout", "dynamic"),
    ],
)
def test_config_names_what_is_wrong(field, value):
    with pytest.raises(InputError, match=f"{field} is {value!r}; it must be"):
        LPAConfig(**{field: value})


def test_other_errors():
    with pytest.raises(InputError, match="local is False"):
        dataclasses.replace(LPAConfig.local_only(), local=False)
    with pytest.raises(InputError, match="multiple of num_heads"):
        LPA(10, 3, SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="no LPA"):
        harden(SelfAttention(D, H, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match=r"progress=1.5; it must lie in \[0, 1\]"):
        set_anneal(LPA(D, H, SMALL, rngs=nnx.Rngs(0)), 1.5)
