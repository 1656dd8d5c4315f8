"""What goes into and comes out of every token mixer of a model."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from flax import nnx

from edgespeech.conversion.layers import mixer_layers
from edgespeech.nn.lpa import LPA
from edgespeech.types import Array, Float, Frames, Lengths


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
    with _tapped(mixer_layers(model), lambda _, seen: calls.append(seen)):
        output = model(*inputs) if call is None else call(model, *inputs)
    return output, calls


class Gates(NamedTuple):
    """The pulses of one LPA in one call.

    Attributes:
        kinds: gates `[b h p n]` of each kind of pulse; see `LPA.gates`.
        lengths: `[b]`, valid frames of the layer.
    """

    kinds: dict[str, Float[Array, "b h p n"]]
    lengths: Lengths


def capture_gates(
    model: nnx.Module, *inputs, call: Callable | None = None
) -> tuple[Any, dict[tuple, Gates]]:
    """As `capture`; returns the output, and the gates of every LPA by the path of its layer in `mixer_layers`."""
    layers = {p: x for p, x in mixer_layers(model).items() if isinstance(x.mixer, LPA)}
    calls: dict[tuple, Captured] = {}
    with _tapped(layers, calls.__setitem__):
        output = model(*inputs) if call is None else call(model, *inputs)
    return output, {
        path: Gates(layers[path].mixer.gates(seen.x, seen.lengths), seen.lengths)
        for path, seen in calls.items()
    }


@contextlib.contextmanager
def _tapped(
    layers: Mapping[tuple, Any], record: Callable[[tuple, Captured], None]
) -> Iterator[None]:
    """Hands on every call of the layers' mixers, with the path of the layer."""
    mixers = {path: layer.mixer for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            tap = _Tap(layer.mixer, functools.partial(record, path))
            object.__setattr__(layer, "mixer", tap)
        yield
    finally:
        for path, layer in layers.items():
            object.__setattr__(layer, "mixer", mixers[path])
