"""SepFormer in the latency program: its parts make up the model, and the peer is the same model."""

import importlib.util
import sys
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.evaluation.latency_models import prepare_forward, prepare_parts
from edgespeech.evaluation.latency_sepformer import (
    TimedSepFormer,
    load_speechbrain,
    random_speechbrain_model,
)
from edgespeech.interop.speechbrain_sepformer import load_speechbrain_sepformer
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa import LPA, LPAConfig
from tests.support.modules import randomize
from tests.support.sepformer import SMALL as CONFIG

SMALL_LPA = LPAConfig(aperiodic=2, periodic=1, positional=1, kernel_size=3, local_kernel_size=3)


def noise(samples):
    return np.float32(0.1 * np.random.default_rng(0).normal(size=(1, samples)))


def test_parts_make_up_the_model():
    timed = TimedSepFormer(CONFIG, SMALL_LPA)
    model = randomize(timed.build((1, 2)))
    layers = [layer for block in model.mask_network.blocks for layer in block.intra.layers]
    assert [type(layer.mixer) for layer in layers] == [SelfAttention, LPA, LPA, SelfAttention]
    audio = noise(250)
    want = nnx.jit(lambda m, *a: m(*a).estimates)(model, jnp.asarray(audio), jnp.asarray([250]))
    assert np.std(want) > 1e-3
    outputs, calls = [], {}

    class Recorder(TimedSepFormer):
        def run_parts(self, model, audio, lengths, run):
            outputs.append(super().run_parts(model, audio, lengths, run))
            return outputs[0]

    uses = prepare_parts(Recorder(CONFIG, SMALL_LPA), model, audio, calls)
    np.testing.assert_allclose(outputs[0], want, atol=1e-5 * np.abs(want).max(), rtol=0)
    counts = Counter(part for part, _ in uses)
    assert counts == {
        "encoder": 1,
        "mixers": 4,
        "ffn": 2 * (1 + 2 * 2 + 2),
        "inter": 2,
        "decoder": 1,
    }
    mixers = [key for part, key in uses if part == "mixers"]
    assert mixers[0] == mixers[3] != mixers[1] == mixers[2]
    found = prepare_forward(timed, model, audio)()
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_the_model_under_test():
    timed = TimedSepFormer(CONFIG, SMALL_LPA)
    assert (timed.num_layers, timed.sample_rate) == (4, 8000)
    model = timed.build((3,))
    assert model.mask_network.blocks[1].intra.layers[1].mixer.inference


def test_speechbrain_is_the_same_model(tmp_path):
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("speechbrain") is None:
        pytest.skip("speechbrain is not installed")
    before = dict(sys.modules)
    try:
        theirs = random_speechbrain_model(CONFIG)
        for name in ("encoder", "masknet", "decoder"):
            torch.save(getattr(theirs, name).state_dict(), tmp_path / f"{name}.ckpt")
        ours = load_speechbrain_sepformer(tmp_path, CONFIG)
        audio = noise(252)
        estimates = load_speechbrain(CONFIG, 1)(audio)().numpy()
    finally:
        # Its lazy modules raise on any look at them, and other tests' libraries look at every module.
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in ("speechbrain", "torchaudio"):
                del sys.modules[name]
    found = ours(jnp.asarray(audio), jnp.asarray([252])).estimates
    np.testing.assert_allclose(found[0].T, estimates[0], atol=1e-4)
    assert np.abs(estimates).max() > 1e-3
