"""Contracts that every module over padded sequences keeps."""

import numpy as np


def padding_contract(call, x, lengths, *, rows=None, out_length=lambda n: n, atol=1e-5):
    """What is valid in an utterance's output depends on that utterance alone.

    Alone or in a padded batch, the output is the same to `atol`; NaN in the padding and garbage in
    the other rows change no bit of it.

    Args:
        call: `(x [b n ...], lengths [b]) -> [b m ...]`; jit it, each row alone is a shape of its own.
        x: finite inputs.
        lengths: at least two different ones.
        rows: rows to try, by default all; each is alone in a shape that compiles anew.
        out_length: valid positions out of so many valid positions in.
        atol: largest difference between alone and in the batch.

    Returns:
        The output on `x`.
    """
    x, lengths = np.asarray(x), np.asarray(lengths)
    sizes = [int(length) for length in lengths]
    assert len(set(sizes)) > 1, "equal lengths have nothing to say about padding"
    out = np.asarray(call(x, lengths))
    is_valid = np.arange(x.shape[1]) < np.asarray(sizes)[:, None]
    is_valid = is_valid.reshape(is_valid.shape + (1,) * (x.ndim - 2))
    nan = np.asarray(call(np.where(is_valid, x, np.float32(np.nan)), lengths))
    # Some amplitude of its own for each position, or a norm would take it out again.
    noise = 100.0 * np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    for row in range(len(sizes)) if rows is None else rows:
        valid = slice(out_length(sizes[row]))
        want = out[row, valid]
        assert np.isfinite(want).all()
        alone = np.asarray(call(x[row : row + 1, : sizes[row]], lengths[row : row + 1]))
        assert alone[0, valid].shape == want.shape
        np.testing.assert_allclose(alone[0, valid], want, atol=atol, err_msg=f"row {row} alone")
        np.testing.assert_array_equal(nan[row, valid], want, err_msg=f"row {row}, NaN in padding")
        others = noise.copy()
        others[row] = x[row]
        garbage = np.asarray(call(others, lengths))[row, valid]
        np.testing.assert_array_equal(garbage, want, err_msg=f"row {row}, garbage in others")
    return out
