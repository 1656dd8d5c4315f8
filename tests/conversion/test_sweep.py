"""The sweep: layers trained side by side are layers trained alone, and errors are what numpy says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from edgespeech.conversion.capture import capture
from edgespeech.conversion.ctc_task import CTCTask
from edgespeech.conversion.mixers import CONTROLS, control_factory, lpa_factory
from edgespeech.conversion.run import Job, Teacher, replacement_order, run_sweep
from edgespeech.conversion.sweep import (
    LayerError,
    Pairs,
    capture_pairs,
    layer_errors,
    make_replacements,
    output_variances,
    stack,
    sweep_objective,
    sweep_progress,
    unstack,
)
from edgespeech.errors import InputError
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA, LPAConfig, anneal
from edgespeech.training.state import OptimizerConfig, init_state, make_optimizer, make_step
from tests.support.tiny import (
    QUIET,
    assert_same_bits,
    batch_with_filler,
    tiny_model,
    tone_source,
)

SMALL_LPA = LPAConfig(aperiodic=2, periodic=1, positional=1, kernel_size=3, local_kernel_size=3)
STEPS = 6
LENGTHS = np.asarray([9, 4, 0, 7])  # the third row is filler


@pytest.fixture(scope="module")
def teacher():
    return Teacher(tiny_model(), CTCTask())


@pytest.fixture(scope="module")
def pairs():
    """Random pairs of three layers of very different size, with garbage beyond the lengths."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 3, 4, 9, 16)).astype(np.float32)
    y = y * np.asarray([0.1, 1.0, 30.0], np.float32)[:, None, None, None] + 2.0
    return Pairs(x, y, LENGTHS)


def valid(array):
    """The frames `[l i d]` that count."""
    return np.concatenate([array[:, row, :length] for row, length in enumerate(LENGTHS)], axis=1)


def replacements(seed=0):
    return make_replacements(tiny_model(), lpa_factory(SMALL_LPA), seed)


def job(path):
    return Job(path, tone_source(), seed=5, loop=QUIET)


def test_pairs_are_the_captured_calls_without_filler(teacher):
    batch = batch_with_filler(tone_source())
    _, calls = capture(teacher.model, batch.audio, batch.audio_lengths)
    found = teacher.pairs(batch)
    plain = capture_pairs(teacher.model, CTCTask(), batch)
    np.testing.assert_array_equal(found.lengths, plain.lengths)
    real = batch.weights > 0
    for layer, call in enumerate(calls):
        for values in (found, plain):
            np.testing.assert_allclose(values.x[layer][real], call.x[real], rtol=0, atol=1e-5)
            np.testing.assert_allclose(values.y[layer][real], call.y[real], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found.lengths, calls[0].lengths * batch.weights)
    assert (found.lengths[batch.weights == 0] == 0).all()


def test_variances_equal_numpy(pairs):
    frames = valid(pairs.y).astype(np.float64)
    expected = frames.var(axis=1).mean(-1)
    np.testing.assert_allclose(output_variances([pairs]), expected, rtol=1e-5)
    # In two parts of different size the same: sums are kept, not means of means.
    parts = [Pairs(pairs.x[:, i], pairs.y[:, i], pairs.lengths[i]) for i in ([0, 1], [2, 3])]
    np.testing.assert_allclose(output_variances(parts), expected, rtol=1e-5)


def test_layer_errors_equal_numpy(pairs):
    modules = replacements()
    expected = []
    for layer, module in enumerate(modules):
        hard = nnx.clone(module)
        hard.progress[...], hard.hard[...] = jnp.ones(()), jnp.ones(())
        prediction = np.asarray(hard(pairs.x[layer], LENGTHS), np.float64)
        error = valid(prediction[None] - pairs.y[layer][None])
        expected.append(np.mean(error**2))
    found = layer_errors(*stack(modules), [pairs])
    np.testing.assert_allclose([e.mse for e in found], expected, rtol=1e-5)
    variances = valid(pairs.y).astype(np.float64).var(axis=1).mean(-1)
    np.testing.assert_allclose([e.variance for e in found], variances, rtol=1e-5)
    np.testing.assert_allclose(
        [e.relative_mse for e in found], np.asarray(expected) / variances, rtol=1e-5
    )
    halves = [Pairs(pairs.x[:, i], pairs.y[:, i], pairs.lengths[i]) for i in ([0], [1, 2, 3])]
    in_parts = layer_errors(*stack(modules), halves)
    np.testing.assert_allclose([e.mse for e in in_parts], expected, rtol=1e-5)
    # The modules are still soft: what is measured hard is a copy.
    assert float(modules[0].hard[...]) == 0


def test_padding_and_filler_count_nowhere(pairs):
    stacked = stack(replacements())
    x, y = pairs.x.copy(), pairs.y.copy()
    for row, length in enumerate(LENGTHS):
        x[:, row, length:], y[:, row, length:] = np.nan, np.nan
    broken = Pairs(x, y, LENGTHS)
    np.testing.assert_array_equal(output_variances([broken]), output_variances([pairs]))
    for a, b in zip(layer_errors(*stacked, [broken]), layer_errors(*stacked, [pairs]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)

    for row, length in enumerate(LENGTHS):
        x[:, row, length:], y[:, row, length:] = 5.0, -7.0
    graphdef, params, rest = stacked
    loss = sweep_objective(graphdef, rest, jnp.ones(3), STEPS)
    gradient = jax.jit(
        lambda pairs: jax.grad(lambda p: loss(p, pairs, None, jnp.asarray(2))[0])(params)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        gradient(Pairs(x, y, LENGTHS)),
        gradient(pairs),
    )


def test_objective_is_the_sum_of_relative_errors(pairs):
    modules = replacements()
    graphdef, params, rest = stack(modules)
    variances = np.asarray([0.5, 2.0, 9.0])
    loss = jax.jit(sweep_objective(graphdef, rest, jnp.asarray(variances), 100))
    for step, progress, hard in ((0, 0.0, 0.0), (35, 0.5, 0.0), (70, 1.0, 1.0), (99, 1.0, 1.0)):
        relative = []
        for layer, module in enumerate(modules):
            anneal(module, jnp.asarray(progress), jnp.asarray(hard))
            error = valid((np.asarray(module(pairs.x[layer], LENGTHS)) - pairs.y[layer])[None])
            relative.append(np.mean(error.astype(np.float64) ** 2) / variances[layer])
        value, metrics = loss(params, pairs, None, jnp.asarray(step))
        np.testing.assert_allclose(value, np.sum(relative), rtol=1e-5)
        np.testing.assert_allclose(metrics["relative_mse"], np.mean(relative), rtol=1e-5)


def test_without_the_curriculum_it_is_cold_and_hard_from_the_start(pairs):
    modules = replacements()
    graphdef, params, rest = stack(modules)
    variances = np.asarray(
        [1.0, 1.0, 1e6]
    )  # the third layer's targets are large and would hide the others
    loss = jax.jit(sweep_objective(graphdef, rest, jnp.asarray(variances), 100, curriculum=False))
    values = [float(loss(params, pairs, None, jnp.asarray(step))[0]) for step in (0, 30, 99)]
    mse = [error.mse for error in layer_errors(graphdef, params, rest, [pairs])]
    expected = np.sum(mse / variances)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    with_it = jax.jit(sweep_objective(graphdef, rest, jnp.asarray(variances), 100))
    soft = [float(with_it(params, pairs, None, jnp.asarray(step))[0]) for step in (0, 30, 99)]
    assert abs(soft[0] - expected) > 1e-3 * expected
    np.testing.assert_allclose(soft[2], expected, rtol=1e-5)


def test_a_sweep_without_the_curriculum_has_checkpoints_of_its_own(teacher, tmp_path):
    heldout = [teacher.pairs(next(tone_source().eval_batches()))]
    run_sweep("lpa", teacher, lpa_factory(SMALL_LPA), 2, heldout, job(tmp_path))
    with pytest.raises(InputError, match="curriculum was True and is False"):
        run_sweep(
            "lpa", teacher, lpa_factory(SMALL_LPA), 2, heldout, job(tmp_path), curriculum=False
        )


def test_random_projections():
    """Of the attention's sizes, and drawn as those of a new LPA are."""
    attention = SelfAttention(16, 2, rngs=nnx.Rngs(0))
    for factory in (
        lpa_factory(LPAConfig.mean_only(), "random"),
        control_factory("mean_only", 2, "random"),
    ):
        mixer = factory(attention, nnx.Rngs(1))
        assert_same_bits(
            nnx.state(mixer), nnx.state(LPA(16, 2, LPAConfig.mean_only(), rngs=nnx.Rngs(1)))
        )
        for name in ("v_proj", "out_proj"):
            ours, theirs = (getattr(m, name).kernel[...] for m in (mixer, attention))
            assert np.abs(ours - theirs).min() > 0


def test_progress_table():
    table = {0: (0, 0), 7: (0.1, 0), 35: (0.5, 0), 69: (69 / 70, 0), 70: (1, 1), 100: (1, 1)}
    for step, expected in table.items():
        found = sweep_progress(jnp.asarray(step), 100)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(sweep_progress(jnp.asarray(0), 1), (0, 0))


def test_stack_and_unstack_are_inverse():
    modules = replacements()
    for before, after in zip(modules, unstack(*stack(modules), 3), strict=True):
        assert nnx.split(before)[0] == nnx.split(after)[0]
        assert_same_bits(nnx.state(before), nnx.state(after))


def test_replacements_are_a_function_of_seed_and_layer():
    first, again, other = replacements(1), replacements(1), replacements(2)
    assert_same_bits([nnx.state(m) for m in first], [nnx.state(m) for m in again])
    kernels = [np.asarray(m.rho_kernel[...]) for m in (*first, *other)]
    assert all((a != b).all() for i, a in enumerate(kernels) for b in kernels[:i])


def test_side_by_side_equals_alone(teacher, tmp_path):
    source = tone_source()
    heldout = [teacher.pairs(batch) for batch in source.eval_batches()]
    together, errors = run_sweep(
        "lpa", teacher, lpa_factory(SMALL_LPA), STEPS, heldout, job(tmp_path)
    )
    start = make_replacements(teacher.model, lpa_factory(SMALL_LPA), 5)
    variances = jnp.asarray(output_variances(heldout), jnp.float32)
    for layer in range(3):
        graphdef, params, rest = stack(start[layer : layer + 1])
        _, unravel = ravel_pytree(params)
        config = OptimizerConfig(learning_rate=3e-3, clip=1e9, weight_decay=0.0, average_decay=0.0)
        optimizer = make_optimizer(config, STEPS, params)
        objective = sweep_objective(graphdef, rest, variances[layer : layer + 1], STEPS)
        step = jax.jit(make_step(objective, unravel, optimizer, 0.0))
        state = init_state(params, optimizer)
        for index in range(STEPS):
            x, y, lengths = teacher.pairs(source.batch(index))
            alone = Pairs(x[layer : layer + 1], y[layer : layer + 1], lengths)
            state, _ = step(state, alone, jax.random.key(0))
        params = unravel(state.params)
        (module,) = unstack(graphdef, params, rest, 1)
        moved = 0.0
        for a, b, c in zip(
            *(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (module, together[layer])),
            jax.tree.leaves(nnx.state(start[layer], nnx.Param)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
            moved = max(moved, float(jnp.max(jnp.abs(b - c))))
        assert moved > 1e-3
        (error,) = layer_errors(
            graphdef,
            params,
            rest,
            [Pairs(p.x[layer][None], p.y[layer][None], p.lengths) for p in heldout],
        )
        np.testing.assert_allclose(error, errors[layer], rtol=1e-4)


def test_attention_seen_through_a_window_that_holds_everything_is_exact(teacher, tmp_path):
    heldout = [teacher.pairs(batch) for batch in tone_source().eval_batches()]
    # The first update has learning rate 0: the copied projections stay.
    factory = control_factory("sliding_window", window=50)
    _, errors = run_sweep("sliding_window", teacher, factory, 1, heldout, job(tmp_path))
    assert all(error.relative_mse < 1e-10 for error in errors)
    # A window of one frame to each side is something else.
    narrow = make_replacements(teacher.model, control_factory("sliding_window", window=1), 0)
    assert all(error.relative_mse > 1e-4 for error in layer_errors(*stack(narrow), heldout))


def test_a_mixer_that_can_be_represented_is_learned(pairs):
    attention = SelfAttention(16, 2, rngs=nnx.Rngs(0))
    config = LPAConfig(0, 0, 0, 0, 0, local_kernel_size=3)
    start = [LPA.from_attention(attention, config, rngs=nnx.Rngs(i)) for i in range(3)]
    targets = unstack(*stack(start), 3)
    for layer, target in enumerate(targets):
        noise = np.random.default_rng(layer).normal(size=(3, 16)) / 4
        target.local_kernel[...] = target.local_kernel[...] + noise
    y = np.stack([np.asarray(t(pairs.x[i], LENGTHS)) for i, t in enumerate(targets)])
    exact = pairs._replace(y=y)
    graphdef, params, rest = stack(start)
    before = layer_errors(graphdef, params, rest, [exact])
    variances = jnp.asarray(output_variances([exact]), jnp.float32)
    steps = 600
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, weight_decay=0.0), steps, params)
    _, unravel = ravel_pytree(params)
    step = make_step(sweep_objective(graphdef, rest, variances, steps), unravel, optimizer, 0.0)

    @jax.jit
    def learn(state):
        return jax.lax.fori_loop(0, steps, lambda _, s: step(s, exact, jax.random.key(0))[0], state)

    state = learn(init_state(params, optimizer))
    after = layer_errors(graphdef, unravel(state.params), rest, [exact])
    for first, last in zip(before, after, strict=True):
        assert first.relative_mse > 0.1
        assert last.relative_mse < 1e-4


def test_a_replacement_without_parameters_is_measured_and_not_trained(teacher, tmp_path):
    heldout = [teacher.pairs(batch) for batch in tone_source().eval_batches()]
    factory = control_factory("removed", window=1)
    modules, errors = run_sweep("removed", teacher, factory, STEPS, heldout, job(tmp_path))
    assert not (tmp_path / "checkpoints").exists()
    frames = [
        np.concatenate(
            [np.asarray(p.y[:, r, :n]) for p in heldout for r, n in enumerate(p.lengths)], 1
        )
    ]
    expected = np.mean(frames[0].astype(np.float64) ** 2, axis=(1, 2))
    np.testing.assert_allclose([e.mse for e in errors], expected, rtol=1e-5)
    np.testing.assert_array_equal(modules[1](heldout[0].x[1], heldout[0].lengths), 0.0)


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_runs(name):
    attention = SelfAttention(16, 2, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 6, 16)).astype(np.float32)
    mixer = control_factory(name, window=2)(attention, nnx.Rngs(1))
    y = mixer(x, np.asarray([6]))
    assert y.shape == x.shape
    assert np.isfinite(y).all()
    if name != "removed":
        np.testing.assert_array_equal(mixer.v_proj.kernel[...], attention.v_proj.kernel[...])
        np.testing.assert_array_equal(mixer.out_proj.kernel[...], attention.out_proj.kernel[...])


def test_an_unknown_control():
    with pytest.raises(ValueError, match=r"'nothing' is not known: choose from .*mean_only"):
        control_factory("nothing", 3)


def test_other_orders():
    errors = [LayerError(mse, variance) for mse, variance in ((3.0, 9.0), (1.0, 1.0), (2.0, 8.0))]
    assert replacement_order(errors, "relative_mse") == (2, 0, 1)
    assert replacement_order(errors, "forward") == (0, 1, 2)
    assert replacement_order(errors, "backward") == (2, 1, 0)
    shuffled = {replacement_order(errors, "random", seed) for seed in range(20)}
    assert len(shuffled) > 3
    assert all(sorted(order) == [0, 1, 2] for order in shuffled)
    assert replacement_order(errors, "random", 5) == replacement_order(errors, "random", 5)


def test_order_is_by_ascending_mse_and_stable():
    errors = [LayerError(mse, 1.0) for mse in (0.3, 0.1, 0.2, 0.1)]
    assert replacement_order(errors) == (1, 3, 2, 0)
