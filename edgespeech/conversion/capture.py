"""What goes into and comes out of every token mixer of a model."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from edgespeech.conversion.layers import mixer_layers
from edgespeech.types import Frames, Lengths


class Captured(NamedTuple):
    """One call of one mixer: `y = mixer(x, lengths)`.

    Attributes:
        x: `[b n d]`, the mixer's input.
        y: `[b n d]`, its output, after the output projection.
        lengths: `[b]`, valid frames.
    """

    x: Frames
    y: Frames
    lengths: Lengths


class _Tap:
    """Calls a mixer and hands on what went in and out."""

    def __init__(self, mixer: Callable, record: Callable[[Captured], None]):
        self._mixer = mixer
        self._record = record

    def __call__(self, x: Frames, lengths: Lengths) -> Frames:
        y = self._mixer(x, lengths)
        self._record(Captured(x, y, lengths))
        return y


def capture(model: nnx.Module, *inputs, call: Callable | None = None) -> tuple[Any, list[Captured]]:
    """Calls `model(*inputs)`, or `call(model, *inputs)`; returns its output and what each mixer saw, in order.

    The mixers are wrapped for the duration of the call and then put back. Works inside jit. The layers must run one by
    one: in a scan over layers the values belong to the scan's body.
    """
    calls: list[Captured] = []
    layers = mixer_layers(model).values()
    mixers = [layer.mixer for layer in layers]
    try:
        for layer in layers:
            object.__setattr__(layer, "mixer", _Tap(layer.mixer, calls.append))
        output = model(*inputs) if call is None else call(model, *inputs)
    finally:
        for layer, mixer in zip(layers, mixers, strict=True):
            object.__setattr__(layer, "mixer", mixer)
    return output, calls
