"""Multiplications to each exit: the published shares, and the products in the traced program."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from edgespeech.evaluation.macs import count_macs
from edgespeech.models.exit_macs import exit_macs
from edgespeech.models.splitformer import Splitformer, SplitformerConfig
from edgespeech.models.wav2vec2 import Wav2Vec2Config
from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits, Wav2Vec2ExitsConfig
from edgespeech.ops.features import log_mel
from tests.support.tiny import tiny_config
from tests.support.tiny_exits import exit_config

TEN_SECONDS = 160_000


@pytest.mark.parametrize(("exit", "share"), [(1, 0.23), (6, 0.08)])
def test_published_cost_of_the_branches(exit, share):
    baseline = exit_macs(SplitformerConfig.ee_baseline(), TEN_SECONDS)
    split = exit_macs(SplitformerConfig.splitformer(), TEN_SECONDS)
    assert split[exit - 1] / baseline[exit - 1] - 1 == pytest.approx(share, abs=0.005)


def products(jaxpr):
    """Multiplications of every matrix product and convolution of a traced program without loops."""
    total = 0
    for equation in jaxpr.eqns:
        for inner in jax.core.jaxprs_in_params(equation.params):
            total += products(inner)
        shape = equation.outvars[0].aval.shape
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += math.prod(shape) * math.prod(left[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            total += math.prod(shape) * math.prod(equation.invars[1].aval.shape[:2])
    return total


@pytest.mark.parametrize(
    "changes",
    [{}, {"branches": "all", "layers_per_exit": 2, "positions": "relative"}],
    ids=["splitformer", "relative"],
)
def test_products_of_the_program(changes):
    config = exit_config(**changes)
    t = 98 * 160  # 99 feature frames: none is left over by the convolutions
    n = config.num_frames(t)
    assert n == 24
    model = Splitformer(config, rngs=nnx.Rngs(0))
    traced = jax.make_jaxpr(lambda x, lengths: model(x, lengths).exit_logits)(
        np.zeros((1, t), np.float32), np.array([t])
    )
    # The depthwise convolution is written as a sum of products, the filters are features.
    layers = config.num_exits * config.layers_per_exit * n
    layers += sum(config.has_branch(m) for m in range(config.num_exits)) * n // 2
    depthwise = layers * config.conv_kernel * config.width
    filters = 99 * 513 * config.num_mels
    assert exit_macs(config, t)[-1] == products(traced.jaxpr) - filters + depthwise


@pytest.mark.parametrize("front_end", ["logmel", "waveform"])
def test_products_of_a_wav2vec2_with_exits(front_end):
    groups = {"position_groups": 4} if front_end == "waveform" else {}
    encoder = tiny_config(num_layers=4, front_end=front_end, **groups)
    config = Wav2Vec2ExitsConfig(encoder, (1, 3, 4), own_heads=True)
    t, d, c = 320 * 30 + 80, encoder.width, encoder.front_channels
    n = config.num_frames(t)
    model = Wav2Vec2Exits.create(config, rngs=nnx.Rngs(0))
    shapes = jax.ShapeDtypeStruct((1, t), np.float32), jax.ShapeDtypeStruct((1,), np.int32)
    traced = count_macs(lambda *audio: model(*audio).exit_logits, *shapes).total()
    if front_end == "logmel":
        # The filters are features; the depthwise convolutions are written as sums of products.
        traced -= count_macs(lambda x: log_mel(x, encoder.num_mels), shapes[0]).total()
        traced += n * (7 * c * encoder.conv_blocks + encoder.position_kernel * d)
    got = exit_macs(config, t)
    if front_end == "logmel":
        assert got[-1] == traced
    else:
        # Taps on the zeros around the utterance are not counted there.
        assert got[-1] == pytest.approx(traced, rel=0.01)
    layer = n * (4 * d * d + 2 * n * d + 2 * d * encoder.ffn_width)
    head = n * d * encoder.vocab_size
    np.testing.assert_array_equal(np.diff(got), [2 * layer + head, layer + head])


def test_wav2vec2_base_by_hand():
    """Five seconds: 15999, 7999, 3999, 1999, 999, 499 and 249 positions behind the seven convolutions."""
    macs = exit_macs(Wav2Vec2ExitsConfig.evenly(Wav2Vec2Config.base(), 6), 5 * 16_000)
    d, n = 768, 249
    convolutions = 512**2 * (3 * (7999 + 3999 + 1999 + 999) + 2 * (499 + 249))
    first = 2 * 15_999 * 10 * 512  # for the statistics of its norm, and for its output
    front_end = first + convolutions + n * (512 * d + 128 * d * (d // 16))
    segment = 2 * n * (4 * d * d + 2 * n * d + 2 * d * 3072) + n * d * 32
    assert macs == tuple(front_end + m * segment for m in range(1, 7))


def test_bilstm_heads_and_short_audio():
    linear, bilstm = (exit_macs(exit_config(head=head), 3520) for head in ("linear", "bilstm"))
    d, v, w, n = 8, 5, 3, 5
    head = n * (2 * 4 * (w * d + w * w) + 2 * w * v)
    np.testing.assert_array_equal(np.subtract(bilstm, linear), np.arange(1, 4) * (head - n * d * v))
    assert exit_macs(exit_config(), 100) == (0, 0, 0)
