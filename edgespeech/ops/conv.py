"""Convolutions over time, and the lengths that come out of them."""

import functools
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from edgespeech.ops.mask import zero_padding
from edgespeech.types import Array, Float, Frames, Mask


@overload
def conv_length(length: int, kernel: int, stride: int) -> int: ...
@overload
def conv_length(length: Array, kernel: int, stride: int) -> Array: ...
def conv_length(length, kernel, stride):
    """Output positions of an unpadded convolution: `max(0, (length - kernel) // stride + 1)`.

    Works on Python integers and on integer arrays.
    """
    if isinstance(length, int):
        return max(0, (length - kernel) // stride + 1)
    # Of a number that is not negative, the truncating division: seven floor divisions in a row, each with its own
    # selects, made the compiler take half a minute for a model of two layers.
    windows = jnp.maximum(length - kernel + stride, 0)
    return lax.div(windows, jnp.full_like(windows, stride))


def conv1d(x: Frames, kernel: Float[Array, "k d e"], stride: int = 1, groups: int = 1) -> Frames:
    """Unpadded convolution `y_i = sum_j x_{i s + j} K_j`, `[b n d] -> [b (n-k)//s+1 e]`."""
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(stride,),
        padding="VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


def grouped_conv1d(x: Frames, kernel: Float[Array, "k d/g e"], groups: int) -> Frames:
    """`conv1d` of stride 1 in groups, `[b n d] -> [b n-k+1 e]`, with a kernel gradient of its own.

    XLA's gradient of the kernel is slow on CPU; here it is a matrix product of every group for each tap (the positional
    convolution of wav2vec2-base at 500 frames: 3,200 ms against 84 ms, forward 52 ms, 2 cores, jax 0.10.2).
    """
    return _grouped(x, kernel, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _grouped(x, kernel, groups):
    return conv1d(x, kernel, groups=groups)


def _grouped_forward(x, kernel, groups):
    return conv1d(x, kernel, groups=groups), (x, kernel)


def _grouped_backward(groups, saved, gradient):
    x, kernel = saved
    _, of_x = jax.vjp(lambda x: conv1d(x, kernel, groups=groups), x)
    return *of_x(gradient), _grouped_kernel_gradient(x, gradient, groups).astype(kernel.dtype)


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _grouped_kernel_gradient(x: Frames, gradient: Frames, groups: int) -> Float[Array, "k d/g e"]:
    """`dK_j = sum_i x_{i + j}^T g_i` for each group, one tap after another."""
    b, n, e = gradient.shape
    k, d = x.shape[1] - n + 1, x.shape[2]
    x = x.reshape(b, -1, groups, d // groups)
    gradient = gradient.reshape(b, n, groups, e // groups).transpose(2, 0, 1, 3)
    gradient = gradient.reshape(groups, b * n, -1)

    def tap(j):
        seen = lax.dynamic_slice_in_dim(x, j, n, axis=1).transpose(2, 0, 1, 3)
        seen = seen.reshape(groups, b * n, -1)
        return jnp.einsum("gni,gno->igo", seen, gradient, preferred_element_type=jnp.float32)

    return lax.map(tap, jnp.arange(k)).reshape(k, d // groups, e)


def conv2d(x: Float[Array, "b f m c"], kernel: Float[Array, "k l i e"], stride: int) -> Array:
    """Unpadded convolution of time and mel bins, `[b f m c] -> [b (f-k)//s+1 (m-l)//s+1 e]`.

    `i` is `c`, or 1 where every channel runs alone (depthwise, `e = c`). XLA's gradients of a depthwise convolution are
    slow on CPU, so these are a sum of shifted products (3x3, stride 2, 96 channels, 8 x 188 x 19 positions: 290 ms
    against 7 ms, one core, jax 0.10.2).
    """
    kernel = kernel.astype(x.dtype)
    if kernel.shape[2] == 1 and kernel.shape[3] == x.shape[3]:
        return _depthwise2d(x, kernel, stride)
    return conv2d_reference(x, kernel, stride)


def conv2d_reference(x: Float[Array, "b f m c"], kernel: Array, stride: int) -> Array:
    """`conv2d` through XLA's convolution, its gradients too: the form to test against."""
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise2d(x, kernel, stride):
    return conv2d_reference(x, kernel, stride)


def _depthwise2d_forward(x, kernel, stride):
    return conv2d_reference(x, kernel, stride), (x, kernel)


def _depthwise2d_backward(stride, saved, gradient):
    _, of_both = jax.vjp(functools.partial(_shifted_sum2d, stride=stride), *saved)
    return of_both(gradient)


_depthwise2d.defvjp(_depthwise2d_forward, _depthwise2d_backward)


def _shifted_sum2d(x: Float[Array, "b f m c"], kernel: Array, stride: int) -> Array:
    """`y_pq = sum_ij K_ij * x_{s p + i, s q + j}` for every channel."""
    rows, columns = kernel.shape[:2]
    p_end, q_end = (
        stride * conv_length(n, k, stride) for n, k in zip(x.shape[1:3], kernel.shape, strict=False)
    )
    taps = (
        x[:, i : i + p_end : stride, j : j + q_end : stride] * kernel[i, j, 0]
        for i in range(rows)
        for j in range(columns)
    )
    return functools.reduce(jnp.add, taps)


def depthwise_conv_reference(
    x: Frames, kernel: Float[Array, "k d"], mask: Mask | None = None, causal: bool = False
) -> Frames:
    """`depthwise_conv` through XLA's grouped convolution: the form to test against."""
    k, d = kernel.shape
    if mask is not None:
        x = zero_padding(x, mask)
    left = k - 1 if causal else (k - 1) // 2
    x = jnp.pad(x, ((0, 0), (left, k - 1 - left), (0, 0)))
    return conv1d(x, kernel[:, None, :], groups=d)


def depthwise_conv(
    x: Frames, kernel: Float[Array, "k d"], mask: Mask | None = None, causal: bool = False
) -> Frames:
    """Depthwise convolution `y_i = sum_j K_j * x_{i + j - left}` that keeps the length.

    Written as a sum of k shifted products. XLA's grouped convolution is far slower on CPU when every channel is
    its own group (k 31, 256 channels, 3000 frames: 17.7 ms against 0.5 ms, 2 cores, jax 0.10.2), and on accelerators
    the sum fuses into one pass over memory.

    Args:
        x: `[b n d]`.
        kernel: `[k d]`, tap 0 meets the oldest frame.
        mask: `[b n]`, True = valid; what is not valid counts as zero. None: everything is valid.
        causal: taps reach only into the past (`left = k - 1`), else they are centred (`left = (k - 1) // 2`).

    Returns:
        `[b n d]`.
    """
    k = kernel.shape[0]
    if mask is not None:
        x = zero_padding(x, mask)
    left = k - 1 if causal else (k - 1) // 2
    return _shifted_sum(jnp.pad(x, ((0, 0), (left, k - 1 - left), (0, 0))), kernel.astype(x.dtype))


@jax.custom_vjp
def _shifted_sum(x: Frames, kernel: Float[Array, "k d"]) -> Frames:
    """`y_i = sum_j K_j * x_{i + j}`, `[b n+k-1 d] -> [b n d]`."""
    k = kernel.shape[0]
    n = x.shape[1] - k + 1
    y = x[:, :n] * kernel[0]
    for j in range(1, k):
        y = y + x[:, j : j + n] * kernel[j]
    return y


def _shifted_sum_forward(x: Frames, kernel: Float[Array, "k d"]):
    return _shifted_sum(x, kernel), (x, kernel)


def _shifted_sum_backward(saved, gradient: Frames):
    x, kernel = saved
    k = kernel.shape[0]
    # The gradient of x is the same sum with the kernel turned round.
    padded = jnp.pad(gradient, ((0, 0), (k - 1, k - 1), (0, 0)))
    return _shifted_sum(padded, kernel[::-1]), _kernel_gradient(x, gradient, k)


_shifted_sum.defvjp(_shifted_sum_forward, _shifted_sum_backward)


def _kernel_gradient(x: Frames, gradient: Frames, k: int) -> Float[Array, "k d"]:
    """`dK_j = sum_i x_{i + j} g_i` for every channel, as matrix products over blocks of frames.

    With frames in blocks of m, the products of a block's gradients with the m + k - 1 frames that they meet form a
    matrix for each channel, whose diagonals hold the taps. k separate reductions take eight times as long on a CPU
    (k 31, 192 channels, 3000 frames: 17 ms against 2.3 ms, 2 cores, jax 0.10.2).
    """
    m = 16
    b, n, d = gradient.shape
    blocks = -(-n // m)
    gradient = jnp.pad(gradient, ((0, 0), (0, blocks * m - n), (0, 0)))
    x = jnp.pad(x, ((0, 0), (0, blocks * m + k - 1 - x.shape[1]), (0, 0)))
    windows = x[:, np.arange(blocks)[:, None] * m + np.arange(m + k - 1)]
    products = jnp.einsum(
        "bqid,bqjd->dji",
        windows,
        gradient.reshape(b, blocks, m, d),
        preferred_element_type=jnp.float32,
    )
    # Rows of length m + k - 1 read as rows of length m + k: the diagonals become columns.
    flat = jnp.pad(products.reshape(d, m * (m + k - 1)), ((0, 0), (0, m)))
    return flat.reshape(d, m, m + k)[:, :, :k].sum(1).T.astype(x.dtype)
