"""Streaming LPA against a float64 loop over frames, and the contract of streaming modules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPAConfig, harden, set_anneal
from edgespeech.nn.streaming_lpa import STREAMING_CONFIG, StreamingLPA, causal_conv
from edgespeech.ops import pulse
from tests.support.contracts import padding_contract
from tests.support.gradients import numeric_derivative
from tests.support.modules import randomize
from tests.support.reference import depthwise_conv, parameters, parameters_of_state, sigmoid
from tests.support.streaming import verify_streaming_contract

D, H, N = 6, 2, 7
SMALL = LPAConfig(
    aperiodic=0,
    runs=2,
    periodic=2,
    positional=0,
    mean=1,
    kernel_size=3,
    local_kernel_size=5,
    max_period=8.0,
)
CONTENT = dataclasses.replace(SMALL, readout="content")

call = nnx.jit(lambda lpa, x, lengths: lpa(x, lengths))
gates_of = nnx.jit(lambda lpa, x, lengths: lpa.gates(x, lengths))
step = nnx.jit(lambda lpa, x, lengths, state: lpa.step(x, lengths, state))


def random_lpa(config=SMALL, seed=0, **kwargs):
    return randomize(StreamingLPA(D, H, config, rngs=nnx.Rngs(seed), **kwargs), seed)


def inputs(n=N, lengths=(N, 4, 1), seed=1):
    x = np.random.default_rng(seed).normal(size=(len(lengths), n, D))
    return np.float32(x), np.array(lengths)


def gate(z, tau, hard):
    return (1 - hard) * sigmoid(z / tau) + hard * (z > 0)


def oracle(w, config, x, progress=0.0, hard=0.0):
    """The recurrence for one stream `[n d]`, frame by frame, head by head and pulse by pulse."""
    n, d = x.shape
    c, tau = d // H, 0.02**progress
    v = x @ w["v_proj.kernel"] + w["v_proj.bias"]
    z = depthwise_conv(x, w["content_kernel"], causal=True) if config.runs else x
    y = np.zeros((n, d))
    for h, p in np.ndindex(H, config.num_pulses):
        window = p - config.runs  # which of the pulses with a half-life, if one
        total, count = np.zeros(c), 0.0
        for i in range(n):
            if window < 0:
                score = z[i] @ w["run_kernel"][:, h, p] + w["run_bias"][h, p]
                g = a = gate(score, tau, hard)
            else:
                a = 0.5 ** (1 / 2.0 ** w["log2_half_life"][h, window])
                g = 1.0
                if window < config.periodic:
                    # Periods are log-spaced from 2 to the longest, neighbours in different heads.
                    share = (window * H + h) / (H * config.periodic - 1)
                    period = 2.0 * (config.max_period / 2.0) ** share
                    angle = 2 * np.pi * (i / period - w["phase"][h, window])
                    duty = sigmoid(w["duty_logit"][h, window])
                    g = gate(np.cos(angle) - np.cos(np.pi * duty), tau, hard)
            total = a * total + g * v[i, h * c : (h + 1) * c]
            count = a * count + g
            alpha = w["alpha"][h, p]
            if config.readout == "content":
                score = z[i] @ w["readout_kernel"][:, h, p] + w["readout_bias"][h, p]
                alpha = alpha * (1 + np.tanh(score))
            y[i, h * c : (h + 1) * c] += alpha * g * total / (count + 1e-6)
    if config.local:
        scale = np.repeat(w["local_scale"], c)
        y = y + scale * depthwise_conv(v, w["local_kernel"], causal=True)
    return y @ w["out_proj.kernel"] + w["out_proj.bias"]


@pytest.mark.parametrize("config", [SMALL, CONTENT], ids=["static", "content"])
@pytest.mark.parametrize(("progress", "hard"), [(0.0, 0.0), (0.4, 0.5), (1.0, 1.0)])
def test_matches_the_recurrence(config, progress, hard):
    lpa = random_lpa(config)
    set_anneal(lpa, progress, hard)
    x, lengths = inputs()
    got = call(lpa, x, lengths)
    for row, length in enumerate(lengths):
        want = oracle(parameters(lpa), config, np.float64(x[row, :length]), progress, hard)
        np.testing.assert_allclose(got[row, :length], want, atol=1e-5, rtol=1e-5)


def test_gradient_matches_the_recurrence():
    lpa = random_lpa(CONTENT)
    set_anneal(lpa, 0.2)
    graphdef, params, rest = nnx.split(lpa, nnx.Param, ...)
    x = inputs(5, (5,))[0]
    weight = np.random.default_rng(7).normal(size=(5, D))

    @jax.jit
    @jax.grad
    def gradient(params_and_x):
        params, x = params_and_x
        out = nnx.merge(graphdef, params, rest, copy=True)(x, jnp.array([5]))
        return jnp.sum(np.float32(weight) * out[0])

    of_params, of_x = gradient((params, x))
    grads = parameters_of_state(of_params) | {"x": np.float64(of_x[0])}
    arrays = parameters(lpa) | {"x": np.float64(x[0])}
    assert set(grads) == set(arrays)

    def value(name, array):
        w = arrays | {name: array}
        return np.sum(weight * oracle(w, CONTENT, w["x"], 0.2))

    # One array at a time: in a sum over all of them a small gradient would not show.
    for name, grad in grads.items():
        direction = np.random.default_rng(8).normal(size=grad.shape)
        want = numeric_derivative(functools.partial(value, name), [arrays[name]], [direction])
        assert np.sum(grad * direction) == pytest.approx(want, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(
    ("config", "inference"),
    [(CONTENT, False), (dataclasses.replace(SMALL, local=False), True)],
    ids=["soft", "binary, without local path"],
)
def test_streaming_contract(config, inference):
    lpa = random_lpa(config, inference=inference)
    set_anneal(lpa, 0.3)
    assert (lpa.latency, lpa.stride, lpa.receptive_field) == (0, 1, (None, 0))
    rng = np.random.default_rng(3)
    verify_streaming_contract(
        lpa, lambda b, n: rng.normal(size=(b, n, D)), length=19, gradient_atol=2e-5
    )


def test_streaming_contract_without_pulses():
    config = dataclasses.replace(LPAConfig.local_only(), local_kernel_size=5)
    lpa = random_lpa(config)
    assert lpa.receptive_field == (4, 0)
    rng = np.random.default_rng(4)
    verify_streaming_contract(lpa, lambda b, n: rng.normal(size=(b, n, D)), length=11)


def test_padding_and_neighbours_change_nothing():
    lpa = random_lpa(CONTENT)
    padding_contract(lambda x, lengths: call(lpa, x, lengths), *inputs(), rows=(1,))


def test_chunks_of_one_frame_use_the_loop_and_agree():
    """AUTO takes another form for short chunks than for the whole sequence."""
    lpa = random_lpa()
    x, lengths = inputs(20, (20, 20))
    state, out = lpa.init_state(2), []
    for i in range(20):
        y, got_lengths, state = step(lpa, x[:, i : i + 1], np.array([1, 1]), state)
        np.testing.assert_array_equal(got_lengths, [1, 1])
        out.append(y)
    np.testing.assert_allclose(np.concatenate(out, 1), call(lpa, x, lengths), atol=2e-6)
    np.testing.assert_array_equal(state.position, [20, 20])


def test_periodic_gates_count_the_frames_of_the_stream():
    """From frame 0 the gates of LPA; later those of the absolute frame, even after a day."""
    lpa = random_lpa()
    x, lengths = inputs()
    T = pulse.log_spaced_periods(H, 2, SMALL.max_period)
    phase = lpa.phase[...]
    duty = jax.nn.sigmoid(lpa.duty_logit[...])
    mask = np.arange(N) < lengths[:, None]
    for hard, atol in ((0.0, 2e-7), (1.0, 0.0)):
        set_anneal(lpa, 0.5, hard)
        want = pulse.periodic_gates(T, phase, duty, mask, 0.02**0.5, hard)
        np.testing.assert_allclose(gates_of(lpa, x, lengths)["periodic"], want, atol=atol, rtol=0)
    set_anneal(lpa, 0.5)
    day = 24 * 3600 * 25
    late = np.full((1, 3), True), jnp.array([day], jnp.int32)
    got = nnx.jit(lambda lpa: lpa._periodic_gates(*late))(lpa)
    for h, p, i in np.ndindex(H, 2, 3):
        cycles = np.fmod(day + i, np.float64(T[h, p])) / T[h, p] - np.float64(phase[h, p])
        level = np.cos(np.pi * np.float64(duty[h, p]))
        z = np.cos(2 * np.pi * cycles) - level
        np.testing.assert_allclose(got[0, h, p, i], sigmoid(z / 0.02**0.5), atol=2e-6)


def test_hardened_equals_hard_one():
    lpa, (x, lengths) = random_lpa(), inputs()
    set_anneal(lpa, 0.3, 1.0)
    want, gates = call(lpa, x, lengths), gates_of(lpa, x, lengths)
    assert harden(lpa) is lpa
    for kind, g in gates_of(lpa, x, lengths).items():
        np.testing.assert_array_equal(g, gates[kind])
        assert set(np.unique(g)) <= {0.0, 1.0}
    np.testing.assert_allclose(call(lpa, x, lengths), want, atol=5e-6)
    made_hard = StreamingLPA(D, H, SMALL, rngs=nnx.Rngs(0), inference=True)
    nnx.update(made_hard, nnx.state(lpa))
    np.testing.assert_array_equal(call(made_hard, x, lengths), call(lpa, x, lengths))


def test_annealing_does_not_recompile():
    lpa, (x, lengths) = random_lpa(), inputs()
    traces = []

    @nnx.jit
    def counted(lpa, x):
        traces.append(1)
        return lpa(x, lengths)

    outputs = []
    for progress in (0.0, 1.0):
        set_anneal(lpa, progress, progress)
        outputs.append(np.asarray(counted(lpa, x)))
    assert len(traces) == 1
    assert np.abs(outputs[0] - outputs[1])[0].max() > 1e-3


def test_from_attention_copies_values_and_output():
    attention = SelfAttention(48, 4, rngs=nnx.Rngs(5))
    lpa = StreamingLPA.from_attention(attention, STREAMING_CONFIG, rngs=nnx.Rngs(6))
    assert type(lpa) is StreamingLPA
    for name in ("v_proj", "out_proj"):
        for part in ("kernel", "bias"):
            old = getattr(getattr(attention, name), part)[...]
            np.testing.assert_array_equal(getattr(getattr(lpa, name), part)[...], old)
    # It starts on the scale of attention, on frames whose neighbours correlate by 0.9.
    noise = np.random.default_rng(8).normal(size=(4, 32, 48))
    x = noise.copy()
    for i in range(1, 32):
        x[:, i] = 0.9 * x[:, i - 1] + 0.19**0.5 * noise[:, i]
    x, lengths = np.float32(x), np.full(4, 32)
    attended = nnx.jit(lambda m: m(x, lengths))(attention)
    assert 0.5 < call(lpa, x, lengths).std() / attended.std() < 2.5


def test_content_gates_start_with_their_own_frame():
    lpa, (x, lengths) = StreamingLPA(D, H, SMALL, rngs=nnx.Rngs(0)), inputs()
    want = sigmoid(np.einsum("nd,dhp->hpn", x[0], lpa.run_kernel[...]))
    np.testing.assert_allclose(gates_of(lpa, x, lengths)["runs"][0], want, atol=1e-6)


def test_half_lives_start_log_spaced():
    lpa = StreamingLPA(48, 4, STREAMING_CONFIG, rngs=nnx.Rngs(0))
    half_life = 2.0 ** np.asarray(lpa.log2_half_life[...])
    assert half_life.shape == (4, 8)
    steps = np.diff(np.log2(np.sort(half_life[:, 4:].ravel())))
    np.testing.assert_allclose(steps, 7 / 15, rtol=1e-4)  # 2 to 256 in 15 steps
    np.testing.assert_allclose(half_life[:, :4], pulse.log_spaced_periods(4, 4, 256.0), rtol=1e-5)


def test_state_bytes_do_not_grow_with_time():
    d, h, p, k = 144, 4, 16, 15
    lpa = StreamingLPA(d, h, rngs=nnx.Rngs(0))
    per_stream = 4 * (1 + 2 * (k - 1) * d + p * d + h * p)
    assert lpa.state_bytes(1) == per_stream == 25_604
    assert lpa.state_bytes(8) == 8 * per_stream
    low = StreamingLPA(d, h, rngs=nnx.Rngs(0), dtype=jnp.float16)
    assert low.state_bytes(1) == per_stream - 2 * 2 * (k - 1) * d
    x, lengths = np.zeros((3, 50, d), np.float32), np.full(3, 50)
    state = nnx.eval_shape(lambda: lpa.step(x, lengths, lpa.init_state(3))[2])
    shapes = jax.tree.map(
        lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, lpa.init_state(3)
    )
    assert all(jax.tree.leaves(shapes))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_stays_close_and_sums_in_float32(dtype):
    x, lengths = inputs()
    want = call(random_lpa(), x, lengths)
    low = random_lpa(dtype=dtype)
    out = call(low, x, lengths)
    assert out.dtype == dtype
    assert np.abs(np.float32(out) - want)[0].max() < 0.03 * np.abs(want[0]).max()
    assert low.init_state(1).average.total.dtype == jnp.float32


def test_causal_conv_of_a_stream_that_brings_nothing():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 3, 4)), rng.normal(size=(5, 4))
    past = np.float32(rng.normal(size=(2, 4, 4)))
    _, newest = causal_conv(jnp.float32(x), jnp.float32(kernel), past, np.array([0, 2]))
    np.testing.assert_array_equal(newest[0], past[0])
    np.testing.assert_allclose(newest[1], np.concatenate([past[1, 2:], x[1, :2]]), rtol=1e-6)


def test_refuses_pulses_that_need_the_whole_utterance():
    for kind in ("aperiodic", "positional"):
        config = dataclasses.replace(STREAMING_CONFIG, **{kind: 2})
        with pytest.raises(InputError, match=f"{kind}=2.*whole utterance"):
            StreamingLPA(D, H, config, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="multiple of num_heads"):
        StreamingLPA(10, 3, rngs=nnx.Rngs(0))
