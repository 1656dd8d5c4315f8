"""A demo that runs in the tests' process, and models for it."""

import contextlib
import threading

import numpy as np
import soundfile
from flax import nnx

from edgespeech.conversion.layers import mixer_layers
from edgespeech.conversion.mixers import lpa_factory
from edgespeech.demo.server import DemoServer
from edgespeech.inference.exit_policy import ExitPolicy
from edgespeech.nn.lpa import LPAConfig, harden
from tests.support.modules import randomize
from tests.support.tiny import tiny_model, tone
from tests.support.tiny_exits import exit_model

SPACE = 1  # of CharTokenizer
CLIP = tone("ABC DE AC EDB")
NEVER = ExitPolicy("entropy", -np.inf)  # takes the last exit
LPA = LPAConfig(aperiodic=2, runs=1, periodic=1, positional=0, kernel_size=3, local_kernel_size=5)


def hybrid():
    """Three layers, LPA in the second and the third; it hears several words in `CLIP`."""
    model = randomize(tiny_model(seed=2), 3, 0.4)
    for layer in list(mixer_layers(model).values())[1:]:
        layer.mixer = lpa_factory(LPA)(layer.mixer, nnx.Rngs(0))
    harden(model)
    run = nnx.jit(lambda model, *inputs: model(*inputs).logits[0])
    logits = np.array(run(model, CLIP[None], np.array([len(CLIP)])))
    mean = logits.mean(0)
    # Every token is the most likely one now and then, and the space in a quarter of the frames.
    logits -= mean
    gap = np.delete(logits, SPACE, axis=1).max(axis=1) - logits[:, SPACE]
    bias = np.quantile(gap, 0.25) * (np.arange(logits.shape[1]) == SPACE)
    model.head.bias[...] += bias - mean
    return model


def hybrid_with_exits():
    """Three exits; LPA in all layers, the branches' included."""
    model = exit_model(seed=3, scale=1.0, vocab_size=29, positions="relative")
    for layer in mixer_layers(model).values():
        layer.mixer = lpa_factory(LPA)(layer.mixer, nnx.Rngs(0))
    return harden(model)


@contextlib.contextmanager
def serving(listen, about=None):
    """A server on a free port of loopback, in a thread."""
    with DemoServer("127.0.0.1", 0) as server:
        server.listen, server.about = listen, about or {}
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def wav(path, samples, rate=16_000):
    """Writes float samples exactly; returns the path."""
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path
