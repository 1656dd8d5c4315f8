"""Saved edge Conformers, with attention and with streaming LPA: the same logits, whole and in steps."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.models.edge_conformer import EdgeConformer
from edgespeech.models.edge_conformer_config import EdgeConformerConfig
from edgespeech.nn.chunk_attention import ChunkAttention
from edgespeech.nn.lpa import harden
from edgespeech.nn.lpa_config import LPAConfig
from edgespeech.nn.streaming_lpa import StreamingLPA
from tests.support.modules import randomize
from tests.support.tiny import assert_same_bits

CONFIG = dataclasses.replace(
    EdgeConformerConfig.tiny(),
    vocab_size=CharTokenizer().vocab_size,
    num_mels=12,
    width=8,
    num_layers=2,
    num_heads=2,
    ffn_width=12,
    conv_kernel=3,
    chunk=2,
    left=1,
    train_chunks=(1, 3),
    lpa=LPAConfig(
        aperiodic=0, runs=2, periodic=1, positional=0, mean=1, kernel_size=3, local_kernel_size=3
    ),
)


@pytest.mark.parametrize("mixer", ["attention", "lpa"])
def test_round_trip(tmp_path, mixer):
    config = dataclasses.replace(CONFIG, mixer=mixer)
    model = randomize(EdgeConformer(config, rngs=nnx.Rngs(0)), 0, 0.3)
    if mixer == "lpa":
        harden(model)
    save_pretrained(tmp_path, model, CharTokenizer(), {"steps": 1})
    loaded, tokenizer, _ = load_pretrained(tmp_path)
    assert isinstance(loaded, EdgeConformer)
    assert isinstance(tokenizer, CharTokenizer)
    assert loaded.config == config
    kind = StreamingLPA if mixer == "lpa" else ChunkAttention
    assert all(type(layer.mixer) is kind for layer in loaded.layers)
    assert_same_bits(nnx.state(loaded, nnx.Param), nnx.state(model, nnx.Param))
    audio = jnp.asarray(0.1 * np.random.default_rng(0).normal(size=(1, 5 * 640)), jnp.float32)
    lengths = jnp.asarray([5 * 640])
    want = model(audio, lengths).logits
    np.testing.assert_allclose(loaded(audio, lengths).logits, want, atol=1e-6)
    steps, state = [], loaded.init_state(1)
    for start in range(0, 5 * 640, loaded.chunk):
        piece = audio[:, start : start + loaded.chunk]
        valid = jnp.asarray([piece.shape[1]])
        piece = jnp.pad(piece, ((0, 0), (0, loaded.chunk - piece.shape[1])))
        logits, frames, state = loaded.step(piece, valid, state)
        steps.append(logits[0, : int(frames[0])])
    np.testing.assert_allclose(jnp.concatenate(steps), want[0], atol=1e-4)
