"""Kept gates: read for their own lengths, without effect on any other, and the output is the same to the bit."""

import jax
import numpy as np
import pytest
from flax import nnx

from edgespeech.models.wav2vec2 import Wav2Vec2
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.kept_gates import keep_gates
from edgespeech.nn.lpa import LPA, KeptGates, LPAConfig, harden
from edgespeech.nn.streaming_lpa import StreamingLPA
from edgespeech.ops.pulse import log_spaced_periods, periodic_gates_reference
from tests.support.modules import randomize
from tests.support.tiny import tiny_config

D, H, N = 12, 3, 9
LENGTHS = np.array([N, 4, 1])
CONFIG = LPAConfig(
    aperiodic=2,
    runs=1,
    periodic=2,
    positional=3,
    mean=1,
    kernel_size=3,
    local_kernel_size=3,
    max_period=16.0,
    num_basis=4,
)

jitted = nnx.jit(lambda module, x, lengths: module(x, lengths))


def hard_lpa(config=CONFIG):
    return randomize(LPA(D, H, config, rngs=nnx.Rngs(0), inference=True))


def frames(n=N, b=3):
    return np.random.default_rng(1).normal(size=(b, n, D)).astype(np.float32)


def invert(module):
    """Opens every kept gate that is closed, and closes the others: whoever reads them gives another output."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, LPA):
            lengths, gates = node.kept.get_value()
            node.kept = KeptGates((lengths, {kind: ~gate for kind, gate in gates.items()}))


@pytest.mark.parametrize("kinds", [("periodic", "positional"), ("periodic",), ("positional",)])
def test_same_output_and_the_kept_gates_are_the_ones_read(kinds):
    counts = {kind: 0 for kind in ("periodic", "positional") if kind not in kinds}
    lpa = hard_lpa(LPAConfig(aperiodic=2, num_basis=4, max_period=16.0, **counts))
    want = jitted(lpa, frames(), LENGTHS)
    wanted_gates = lpa.gates(frames(), LENGTHS)
    assert keep_gates(lpa, LENGTHS, N) is lpa
    assert tuple(lpa.kept.get_value()[1]) == kinds
    np.testing.assert_array_equal(jitted(lpa, frames(), LENGTHS), want)
    found = lpa.gates(frames(), LENGTHS)
    assert list(found) == list(wanted_gates)
    for kind, gate in found.items():
        np.testing.assert_array_equal(gate, wanted_gates[kind], err_msg=kind)
    invert(lpa)
    changed = jitted(lpa, frames(), LENGTHS)
    assert np.abs(changed[0] - want[0]).max() > 1e-2


def test_gates_of_several_lengths_against_the_equation():
    lpa = keep_gates(hard_lpa(), LENGTHS, N)
    period = log_spaced_periods(H, CONFIG.periodic, CONFIG.max_period)
    duty = 1 / (1 + np.exp(-np.float64(lpa.duty_logit[...])))
    mask = np.arange(N) < LENGTHS[:, None]
    want = periodic_gates_reference(period, lpa.phase[...], duty, mask, 1.0, 1.0)
    assert 0.1 < want.mean() < 0.6
    np.testing.assert_array_equal(lpa.kept.get_value()[1]["periodic"], want)


@pytest.mark.parametrize(
    ("n", "lengths"), [(N, [N, 4, 2]), (N, [N, 4]), (12, [N, 4, 1]), (6, [6, 4, 1])]
)
def test_other_lengths_compute_their_own(n, lengths):
    """Inverted gates would show."""
    lpa, x, lengths = hard_lpa(), frames(n, len(lengths)), np.array(lengths)
    want = jitted(lpa, x, lengths)
    invert(keep_gates(lpa, LENGTHS, N))
    np.testing.assert_array_equal(jitted(lpa, x, lengths), want)
    keep_gates(lpa, lengths, n)  # in place of the others
    np.testing.assert_array_equal(jitted(lpa, x, lengths), want)


def primitives(jaxpr):
    """Operations that always run: those inside the branches of a cond are left out."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if equation.primitive.name != "cond":
            for inner in jax.core.jaxprs_in_params(equation.params):
                yield from primitives(inner)


def test_a_second_call_does_not_compute_them():
    lpa = hard_lpa()

    def operations():
        graphdef, state = nnx.split(lpa)
        run = jax.make_jaxpr(lambda *args: nnx.merge(graphdef, args[0])(*args[1:]))
        return list(primitives(run(state, frames(), LENGTHS).jaxpr))

    before = operations()
    assert {"cos", "rem"} <= set(before)
    keep_gates(lpa, LENGTHS, N)
    after = operations()
    assert after.count("cond") == before.count("cond") + 1
    assert not {"cos", "rem"} & set(after)


def test_a_whole_model_and_what_of_it_is_saved():
    config = tiny_config(num_layers=3)
    model = Wav2Vec2(config, rngs=nnx.Rngs(0))
    for i in (0, 1):
        model.layers[i].mixer = LPA.from_attention(model.layers[i].mixer, CONFIG, rngs=nnx.Rngs(i))
    harden(randomize(model))
    audio, lengths = 0.1 * frames(6000, 1)[..., 0], np.array([6000])
    run = nnx.jit(lambda model: model(audio, lengths).logits)
    want, saved = run(model), nnx.state(model, nnx.Param)
    n = config.num_frames(6000)
    keep_gates(model, np.array([n]), n)
    np.testing.assert_array_equal(run(model), want)
    assert jax.tree.structure(nnx.state(model, nnx.Param)) == jax.tree.structure(saved)
    invert(model)
    assert np.abs(run(model) - want).max() > 1e-2


def test_what_is_no_hard_lpa_stays_as_it_is():
    soft = LPA(D, H, CONFIG, rngs=nnx.Rngs(0))
    mean = LPA(D, H, LPAConfig.mean_only(), rngs=nnx.Rngs(0), inference=True)
    stream = StreamingLPA(D, H, rngs=nnx.Rngs(0), inference=True)
    attention = SelfAttention(D, H, rngs=nnx.Rngs(0))
    for mixer in (soft, mean, stream, attention):
        before = jax.tree.structure(nnx.state(mixer))
        keep_gates(mixer, LENGTHS, N)
        assert jax.tree.structure(nnx.state(mixer)) == before
