"""The contract of streaming modules: what comes out in pieces is what comes out of the whole.

A streaming module `m` has, next to the call for whole sequences `m(x [b n ...], lengths [b])`, which returns the output
`[b n' ...]`, or a pair of it and its lengths `[b]` where these differ from those of the input:

    m.init_state(batch)             a tree of arrays `[b ...]`: the state before the first frame of `batch` streams
    m.step(chunk, lengths, state)   `[b c ...], [b] -> (out [b c' ...], out_lengths [b], state)`: the next frames of
                                    every stream; row r brings `lengths[r]` of them, at the start, 0..c. A stream that
                                    brings none stays as it is. Valid output frames are at the start as well.
    m.stride                        input frames for each output frame
    m.latency                       output i is there once input frame `stride i + latency` has come in; 0 is causal
    m.receptive_field               (past, future): output i depends on the input frames from `stride i - past` to
                                    `stride i + future`; past is None where nothing bounds it. The widest of all i.
    m.chunk                         optional: streams come in multiples of so many frames, except at their end

The end needs no word of its own: a stream whose last frames were given has all of its outputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def verify_streaming_contract(module, make_input, *, length, atol=1e-5, gradient_atol=1e-5, seed=0):
    """Checks a module on four streams of different lengths, one of them empty.

    - concatenated steps equal the whole sequence, in outputs (to `atol`) and in the gradients of a random projection by
      the input and by every parameter (to `gradient_atol` of the largest one, or of 1), chunk by chunk and in random
      pieces, other ones in every stream;
    - NaN in the padding, and garbage with NaN in the other streams, change no bit, whole or in steps;
    - every leaf of the state has the streams first, and keeps shape and dtype;
    - the latency measured from when outputs come is the declared one; the receptive field measured from gradients, too.

    Args:
        module: with parameters that hide nothing (see `tests.support.modules.randomize`).
        make_input: `(batch, length) -> [b n ...]`, float32.
        length: input frames of the longest stream, more than the receptive field where that is bounded.
        atol: of outputs.
        gradient_atol: of gradients, relative to the largest one of an array.
        seed: of the pieces and the projection.

    Returns:
        The output `[b n' ...]` of the whole sequences, zero beyond the lengths, and these lengths.
    """
    rng = np.random.default_rng(seed)
    chunk = getattr(module, "chunk", 1)
    lengths = np.array([length, 2 * length // 3 + 1, length // 3, 0])
    x = np.float32(make_input(len(lengths), length))
    check_state(module, len(lengths))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    whole, stream = (functools.partial(form, graphdef) for form in (run_whole, run_stream))
    shape = jax.eval_shape(whole, params, rest, x, lengths, 0.0, None)[1][0].shape
    # Almost all of the time goes into compiling programs that then run for milliseconds.
    whole, stream = (
        functools.partial(
            jax.jit(form, compiler_options={"xla_backend_optimization_level": 0}), params, rest
        )
        for form in (whole, stream)
    )
    weight = np.float32(rng.normal(size=shape))
    gradients, (want, counts) = whole(x, lengths, 0.0, weight)
    want, counts = np.asarray(want), np.asarray(counts)
    assert np.isfinite(want).all()
    assert np.ptp(want[0]) > 0, "an output that is constant shows nothing"

    width = 3 * chunk
    splits = [
        schedule(lengths, chunk, chunk),
        *(schedule(lengths, width, chunk, rng) for _ in "ab"),
    ]
    steps = max(
        map(len, splits)
    )  # of one number, and all in one shape: a single program to compile
    for number, pieces in enumerate(splits):
        pieces = np.pad(pieces, ((0, steps - len(pieces)), (0, 0)))
        index = starts(pieces)[..., None] + np.arange(width)
        got_gradients, (got, step_counts) = stream(x, pieces, index, 0.0, weight)
        step_counts, message = np.asarray(step_counts), f"split {number}"
        np.testing.assert_array_equal(step_counts.sum(0), counts, err_msg=f"frames of {message}")
        np.testing.assert_allclose(got, want, atol=atol, err_msg=message)
        assert_gradients(got_gradients, gradients, gradient_atol, message)
        if number == 0:
            check_latency(module, pieces[:, 0], step_counts[:, 0])

    spoiled = stream(x, pieces, index, np.nan, weight)
    assert_same((got_gradients, got), (spoiled[0], spoiled[1][0]), "NaN in the padding of steps")
    spoiled = whole(x, lengths, np.nan, weight)
    assert_same((gradients, want), (spoiled[0], spoiled[1][0]), "NaN in the padding")
    noise = 100 * rng.normal(size=x.shape).astype(np.float32)
    noise[:, ::5] = np.nan
    for row in range(len(lengths)):
        others = noise.copy()
        others[row] = x[row]
        for alone, mixed, how in (
            (want, whole(others, lengths, 0.0, weight), "whole"),
            (got, stream(others, pieces, index, 0.0, weight), "in steps"),
        ):
            assert_same(alone[row], mixed[1][0][row], f"garbage beside stream {row}, {how}")

    first, last = measure_receptive_field(whole, x, lengths, weight[0], int(counts[0]))
    check_receptive_field(module, length, first, last)
    return want, counts


# ------------------------------------------------------------------------------------ both forms, with gradients


def run_whole(graphdef, params, rest, x, lengths, fill, weight):
    """Gradients of `sum(weight output)` by parameters and input; output, zero where not valid, and lengths.

    Without a weight: zeros for the gradients.
    """

    def loss(params, x):
        is_valid = np.arange(x.shape[1]) < lengths[:, None]
        out = nnx.merge(graphdef, params, rest, copy=True)(where(is_valid, x, fill), lengths)
        out, out_lengths = out if isinstance(out, tuple) else (out, lengths)
        out = where(jnp.arange(out.shape[1]) < out_lengths[:, None], out, 0.0)
        return jnp.sum(out * (0.0 if weight is None else weight)), (out, out_lengths)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def run_stream(graphdef, params, rest, x, pieces, index, fill, weight):
    """The same from `step`; instead of the lengths, how many frames each step gave `[steps b]`.

    Args:
        graphdef: of the module, as are params and rest.
        params: its parameters.
        rest: its other variables.
        x: `[b n ...]`.
        pieces: `[steps b]`, valid frames of each piece.
        index: `[steps b c]`, where they are in x.
        fill: what stands in the padding.
        weight: `[b n' ...]`.
    """

    def loss(params, x):
        module = nnx.merge(graphdef, params, rest, copy=True)
        rows = np.arange(x.shape[0])[:, None]

        def step(state, piece):
            index, lengths = piece
            is_valid = jnp.arange(index.shape[1]) < lengths[:, None]
            values = x[rows, jnp.minimum(index, x.shape[1] - 1)]
            out, out_lengths, state = module.step(where(is_valid, values, fill), lengths, state)
            return state, (out, out_lengths)

        _, (out, counts) = jax.lax.scan(step, module.init_state(x.shape[0]), (index, pieces))
        place = jnp.arange(out.shape[2])
        is_valid = place < counts[..., None]
        # What is not valid goes to a frame beyond the last.
        place = jnp.where(
            is_valid, place + (jnp.cumsum(counts, 0) - counts)[..., None], weight.shape[1]
        )
        joined = jnp.zeros((weight.shape[0], weight.shape[1] + 1, *weight.shape[2:]), out.dtype)
        joined = joined.at[rows[None], place].set(where(is_valid, out, 0.0))[:, :-1]
        return jnp.sum(joined * weight), (joined, counts)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def where(mask, x, fill):
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, fill)


# ------------------------------------------------------------------------------------ pieces


def schedule(lengths, width, chunk, rng=None):
    """How many frames every stream brings at each step `[steps b]`: as many as fit, or with rng 0 to `width` of them.

    All are multiples of `chunk` but a stream's last.
    """
    left, steps = np.array(lengths), []
    while left.any():
        brought = np.full(len(left), width)
        if rng is not None:
            brought = chunk * rng.integers(0, width // chunk + 1, len(left))
        steps.append(np.minimum(brought, left))
        left = left - steps[-1]
    return np.stack(steps)


def starts(pieces):
    """Where every piece begins in its stream."""
    return np.cumsum(pieces, axis=0) - pieces


# ------------------------------------------------------------------------------------ checks


def check_state(module, batch):
    """The streams are the first axis of every array in the state."""
    for leaf in jax.tree.leaves(jax.eval_shape(lambda: module.init_state(batch))):
        assert leaf.shape[:1] == (batch,), f"a state of shape {leaf.shape} for {batch} streams"


def check_latency(module, fed, given):
    """`fed` frames in and `given` frames out at each step of one stream, as early as they can come."""
    fed, step_of_output = np.cumsum(fed), np.repeat(np.arange(len(fed)), given)
    waited = fed[step_of_output] - 1 - module.stride * np.arange(len(step_of_output))
    assert waited.max() == module.latency, f"latency is {waited.max()}, not {module.latency}"


def measure_receptive_field(whole, x, lengths, weight, count):
    """Earliest and latest input frame with a gradient, for every output frame of the first stream."""
    first, last = [], []
    for i in range(count):
        picked = np.zeros((len(x), *weight.shape), np.float32)
        picked[0, i] = weight[i]
        gradient = np.asarray(whole(x, lengths, 0.0, picked)[0][1])[0]
        depends = np.flatnonzero(gradient.reshape(len(gradient), -1).any(1))
        assert len(depends), f"output frame {i} depends on no input"
        first.append(depends[0])
        last.append(depends[-1])
    return np.array(first), np.array(last)


def check_receptive_field(module, length, first, last):
    """Compares with what the module declares."""
    past, future = module.receptive_field
    here = module.stride * np.arange(len(first))
    assert module.latency >= future, "an output cannot come before what it depends on"
    assert max(last - here) == future, f"future is {max(last - here)}, not {future}"
    if past is None:
        assert first[-1] <= module.stride, (
            f"the last output does not depend on what is before {first[-1]}"
        )
        return
    assert length > past + future + module.stride, "the input is shorter than the receptive field"
    assert max(here - first) == past, f"past is {max(here - first)}, not {past}"


def assert_gradients(got, want, atol, message):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=atol * scale, err_msg=f"gradient {message}")


def assert_same(a, b, message):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=message)
