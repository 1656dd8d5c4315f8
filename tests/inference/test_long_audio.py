"""What segments of one length share; what they make of a recording is tested with the command line."""

import numpy as np
from flax import nnx

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.inference.long_audio import LongAudio
from edgespeech.nn.lpa import LPA, KeptGates, LPAConfig, harden
from tests.support.modules import randomize
from tests.support.tiny import tiny_model

SMALL = LPAConfig(aperiodic=1, periodic=1, positional=1, kernel_size=3, local_kernel_size=3)


def test_gates_of_a_segment_are_computed_once():
    model = tiny_model()
    model.layers[1].mixer = LPA.from_attention(model.layers[1].mixer, SMALL, rngs=nnx.Rngs(0))
    harden(randomize(model))
    transcribe = LongAudio(model, CharTokenizer(), segment_seconds=1.0, overlap_seconds=0.4)
    (kept,) = nnx.to_flat_state(nnx.filter_state(transcribe._state, KeptGates)).leaves
    lengths, gates = kept.get_value()
    frames = model.config.num_frames(16_000)
    np.testing.assert_array_equal(lengths, [frames])
    assert {kind: gate.shape[-1] for kind, gate in gates.items()} == {
        "periodic": frames,
        "positional": frames,
    }
    assert not hasattr(model.layers[1].mixer, "kept")  # the caller's model is as it was
