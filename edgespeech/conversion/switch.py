"""A mixer slot that holds attention and its replacement, and calls one of them by a flag that is data."""

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.conversion.layers import mixer_layers
from edgespeech.types import Frames, Lengths


class Flag(nnx.Variable):
    """State that is neither trained nor random."""


class Switch(nnx.Module):
    """`replacement(x)` where `active`, else `attention(x)`; only one of the two runs.

    With a plain assignment to the slot every number of replaced layers is another program, each compiled anew for
    every batch shape. Here they are one program, and layers that all hold a switch are alike, so that a scan over
    layers compiles one of them. `finalise` makes the assignment at the end.

    Attributes:
        attention: the mixer that the layer had.
        replacement: the one that takes its place.
        active: boolean scalar.
    """

    def __init__(self, attention: nnx.Module, replacement: nnx.Module):
        self.attention = attention
        self.replacement = replacement
        self.active = Flag(jnp.zeros((), jnp.bool))

    def __call__(self, x: Frames, lengths: Lengths) -> Frames:
        """`[b n d], [b] -> [b n d]`."""
        return jax.lax.cond(
            self.active[...],
            lambda x: self.replacement(x, lengths).astype(x.dtype),
            lambda x: self.attention(x, lengths).astype(x.dtype),
            x,
        )


def install_switches(model: nnx.Module, replacements: list[nnx.Module]) -> None:
    """Puts a `Switch` into every layer's slot, in place; all of them still call attention."""
    for layer, replacement in zip(mixer_layers(model).values(), replacements, strict=True):
        layer.mixer = Switch(layer.mixer, replacement)


def finalise(model: nnx.Module, replaced: tuple[int, ...]) -> None:
    """Replaces every switch by one of its mixers, in place: the plain assignment.

    Args:
        model: a model with switches.
        replaced: layers, from 0, that keep the replacement.
    """
    for index, layer in enumerate(mixer_layers(model).values()):
        switch = layer.mixer
        layer.mixer = switch.replacement if index in replaced else switch.attention
