"""Chunks without seams, the norm over an utterance, and the dual-path block against float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.dual_path import (
    DualPathBlock,
    DualPathLayer,
    chunk_count,
    join_chunks,
    overlap_add,
    sinusoidal_positions,
    split_chunks,
    utterance_norm,
)
from edgespeech.nn.token_mixer_controls import Removed
from tests.support import reference
from tests.support.contracts import padding_contract
from tests.support.modules import randomize
from tests.support.sepformer import dual_path_block, dual_path_layer, global_norm, positions

D, H, WIDTH, K = 8, 2, 12, 6


cut = jax.jit(split_chunks, static_argnums=2)
join = jax.jit(join_chunks, static_argnums=1)
run = nnx.jit(lambda module, *inputs: module(*inputs))


def frames(*shape, seed=1):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


# -------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 30])
def test_chunks_join_to_twice_the_signal_without_a_seam(n):
    x = frames(1, n, 3)
    chunks, count = cut(x, np.array([n]), K)
    assert count[0] == chunks.shape[1]
    padded = np.concatenate([np.zeros((K // 2, 3)), x[0], np.zeros((3 * K, 3))])
    for s, chunk in enumerate(
        np.asarray(chunks[0])
    ):  # chunk s starts half a chunk after the one before
        np.testing.assert_array_equal(chunk, padded[s * K // 2 : s * K // 2 + K])
    np.testing.assert_array_equal(join(chunks, n), 2 * x)


def test_chunks_in_a_batch_are_those_alone():
    x, lengths = frames(3, 13, 2), (13, 8, 1)
    x[1, 8:] = np.nan
    chunks, counts = map(np.asarray, cut(x, np.array(lengths), K))
    for row, n in enumerate(lengths):
        alone, count = map(np.asarray, cut(x[row : row + 1, :n], np.array([n]), K))
        assert counts[row] == count[0] == chunk_count(n, K)
        np.testing.assert_array_equal(chunks[row, : count[0]], alone[0])
        np.testing.assert_array_equal(chunks[row, count[0] :], 0.0)


@pytest.mark.parametrize(
    ("n", "count"), [(1, 2), (124, 2), (125, 4), (374, 4), (375, 6), (1999, 18)]
)
def test_number_of_chunks(n, count):
    assert chunk_count(n, 250) == count


def test_overlap_add_is_the_adjoint_of_cutting():
    # <C(x), y> = <x, A(y)> holds for no other placement of the chunks.
    x, y = frames(1, 11, 2), frames(1, 6, K, 2, seed=2)
    chunks, _ = cut(x, np.array([11]), K)
    assert np.vdot(chunks, y) == pytest.approx(np.vdot(x, join(y, 11)), abs=1e-4)
    want = np.zeros((21, 2))
    for s in range(6):
        want[s * K // 2 : s * K // 2 + K] += y[0, s]
    np.testing.assert_allclose(overlap_add(y)[0], want, rtol=1e-6)


@pytest.mark.parametrize("k", [0, 1, 7])
def test_odd_chunks_are_refused(k):
    with pytest.raises(InputError, match=f"chunks of {k} frames"):
        split_chunks(frames(1, 9, 2), jnp.array([9]), k)


# --------------------------------------------------------------------------------------- parts


def test_positions():
    np.testing.assert_allclose(sinusoidal_positions(40, 10), positions(40, 10), atol=1e-5)


@pytest.mark.parametrize("axes", [(), (K,)])
def test_global_norm(axes):
    norm, x = randomize(utterance_norm(D)), 3.0 + frames(2, 5, *axes, D)
    mask = np.arange(5) < np.array([[5], [2]])
    out = run(norm, np.where(mask.reshape(2, 5, *(1,) * (x.ndim - 2)), x, np.float32(np.nan)), mask)
    out = np.asarray(out)
    for row, n in enumerate((5, 2)):
        want = global_norm(reference.parameters(norm), np.float64(x[row, :n]))
        np.testing.assert_allclose(out[row, :n], want, atol=1e-5)
        np.testing.assert_array_equal(out[row, n:], 0.0)


def test_global_norm_keeps_its_digits_over_minutes_of_chunks():
    x = 100.0 + np.tile(frames(1, 6, 250, 128), (1, 100, 1, 1))  # 19 M: more than float32 can count
    out = np.asarray(jax.jit(lambda x: utterance_norm(128)(x, jnp.ones((1, 600), bool)))(x))
    assert out.mean(dtype=np.float64) == pytest.approx(0.0, abs=2e-5)
    assert out.std(dtype=np.float64) == pytest.approx(1.0, abs=2e-5)


def test_layer():
    layer = randomize(DualPathLayer(D, H, WIDTH, rngs=nnx.Rngs(0)))
    x = frames(1, 5, D)
    want = dual_path_layer(reference.parameters(layer), np.float64(x[0]), H)
    np.testing.assert_allclose(run(layer, x, np.array([5]))[0], want, atol=2e-5)
    # An epsilon of 1e-6 shows where a frame hardly varies; 1e-5 would miss by a factor.
    layer.mixer = Removed()
    x = 1e-3 * x
    want = dual_path_layer(reference.parameters(layer), np.float64(x[0]), 0)
    np.testing.assert_allclose(run(layer, x, np.array([5]))[0], want, atol=2e-5)


# --------------------------------------------------------------------------------------- block


def make_block(seed=0):
    block = DualPathBlock(
        D, num_intra_layers=2, num_inter_layers=1, num_heads=H, ffn_width=WIDTH, rngs=nnx.Rngs(seed)
    )
    return randomize(block, seed, scale=0.2)


call = nnx.jit(lambda block, x, counts, scan: block(x, counts, scan=scan), static_argnums=3)


@pytest.mark.parametrize("scan", [False, True])
def test_block_and_padding(scan):
    block, x, counts = make_block(), frames(2, 6, K, D), (6, 4)
    out = padding_contract(
        lambda x, n: call(block, x, n, scan).chunks, x, counts, rows=(1,), atol=2e-5
    )
    w = reference.parameters(block)
    hidden = call(block, x, jnp.array(counts), scan).hidden
    assert [h.shape for h in hidden] == [(12, K, D)] * 2
    for row, n in enumerate(counts):
        want, layers = dual_path_block(w, np.float64(x[row, :n]), H)
        np.testing.assert_allclose(out[row, :n], want, atol=1e-4)
        np.testing.assert_array_equal(out[row, n:], 0.0)
        for got, layer in zip(hidden, layers, strict=True):
            np.testing.assert_allclose(got.reshape(2, 6, K, D)[row, :n], layer, atol=1e-4)


def test_mixers_get_chunks_and_their_lengths():
    seen = []

    def mixer(x, lengths):
        seen.append((x.shape, lengths))
        return jnp.zeros_like(x)

    def lengths_seen(x, counts):
        block(x, counts, scan=False)
        return [lengths for _, lengths in seen]

    block = make_block()
    for layer in (*block.intra.layers, *block.inter.layers):
        layer.mixer = mixer
    lengths = jax.jit(lengths_seen)(frames(2, 4, K, D), np.array([4, 2]))
    within = [K] * 6 + [0] * 2
    assert [shape for shape, _ in seen] == [(8, K, D)] * 2 + [(2 * K, 4, D)]
    assert [n.tolist() for n in lengths] == [within, within, [4] * K + [2] * K]
