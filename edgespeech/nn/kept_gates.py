"""Gates of hard LPA that do not see the input, computed once for a length and read from then on."""

from flax import nnx

from edgespeech.nn.lpa import LPA, KeptGates
from edgespeech.types import Lengths


def keep_gates(model: nnx.Module, lengths: Lengths, n: int) -> nnx.Module:
    """Computes the periodic and positional gates of every hard LPA, in place, for calls with these lengths.

    Calls in which the mixers see these lengths, in so many frames, read them; every other call computes its own, so
    that outputs are the same with and without. Parameters must not change afterwards. What is no hard LPA stays as it
    is, and so does streaming LPA, whose windows move on with the stream. Ours.

    Args:
        model: hardened.
        lengths: `[b]`, valid frames as the mixers see them.
        n: frames of the batch, padding included.

    Returns:
        The model.
    """
    for _, node in nnx.iter_graph(model):
        if isinstance(node, LPA) and node.inference and not node.causal:
            gates = _length_gates(node, lengths, n)
            if gates:
                node.kept = KeptGates((lengths, gates))
    return model


@nnx.jit(static_argnums=2)
def _length_gates(lpa: LPA, lengths: Lengths, n: int) -> dict:
    return lpa.length_gates(lengths, n)
