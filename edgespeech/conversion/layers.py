"""Finding the layers of a model that have a `mixer`."""

from typing import Any

from flax import nnx

from edgespeech.errors import InputError


def mixer_layers(model: nnx.Module) -> dict[tuple, Any]:
    """The modules with an attribute `mixer`, by path, in the order of their paths (`layers`, 0), (`layers`, 1), ...

    Raises:
        InputError: there is none.
    """
    layers = {
        path: node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module) and hasattr(node, "mixer")
    }
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no layer with an attribute `mixer`: put the token mixer of each layer there"
        )
    return {path: layers[path] for path in sorted(layers)}
