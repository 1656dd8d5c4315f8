"""The streaming Conformer layer against NumPy, and its contract."""

import numpy as np
import pytest
from flax import nnx

from edgespeech.nn.causal_conv import StreamingConvolution
from edgespeech.nn.chunk_attention import ChunkAttention
from edgespeech.nn.streaming_conformer import StreamingConformerLayer
from tests.nn.test_causal_conv import limited
from tests.nn.test_chunk_attention import attention_by_loops
from tests.support import reference
from tests.support.modules import randomize
from tests.support.streaming import verify_streaming_contract

D, H, WIDTH = 8, 2, 12


def make(reach, chunk=3, left=1, kernel_size=5):
    rngs = nnx.Rngs(0)
    mixer = ChunkAttention(D, H, chunk=chunk, left=left, rngs=rngs)
    conv = StreamingConvolution(D, kernel_size, 0.0, reach=reach, chunk=chunk, rngs=rngs)
    layer = StreamingConformerLayer(D, mixer, conv, ffn_width=WIDTH, dropout_rate=0.0, rngs=rngs)
    return randomize(layer)


def inputs(batch, n, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, n, D)).astype(np.float32)


def silu(x):
    return x * reference.sigmoid(x)


def feed_forward(w, x):
    y = reference.layer_norm(reference.part(w, "norm"), x)
    y = silu(reference.linear(reference.part(w, "expand"), y))
    return reference.linear(reference.part(w, "contract"), y)


def layer_by_loops(w, x, chunk, left):
    """One utterance `[n d]`, the convolution chunk-limited."""
    part = reference.part
    x = x + 0.5 * feed_forward(part(w, "ffn1"), x)
    y = reference.layer_norm(part(w, "mixer_norm"), x)
    x = x + attention_by_loops(part(w, "mixer"), y, chunk, left)
    conv = part(w, "conv")
    y = reference.linear(part(conv, "expand"), reference.layer_norm(part(conv, "norm"), x))
    y = limited(y[:, :D] * reference.sigmoid(y[:, D:]), conv["depthwise"], chunk)
    y = silu(reference.layer_norm(part(conv, "middle_norm"), y + conv["depthwise_bias"]))
    x = x + reference.linear(part(conv, "contract"), y)
    x = x + 0.5 * feed_forward(part(w, "ffn2"), x)
    return reference.layer_norm(part(w, "norm"), x)


@pytest.mark.parametrize(
    ("reach", "chunk", "left", "past"),
    [("chunk", 3, 1, 7), ("causal", 3, 1, 9)],
)
def test_streaming_contract(reach, chunk, left, past):
    layer = make(reach, chunk, left)
    assert layer.receptive_field == (past, chunk - 1)  # by hand, and by gradients:
    out, _ = verify_streaming_contract(layer, inputs, length=20)
    if reach == "chunk":
        x = np.float64(inputs(4, 20)[0])
        want = layer_by_loops(reference.parameters(layer), x, chunk, left)
        np.testing.assert_allclose(out[0], want, atol=5e-5)
