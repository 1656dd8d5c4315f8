"""One mesh over the devices of all processes, and what lies where on it.

    data   rows of a batch
    fsdp   rows of a batch as well; the vectors of the training state are cut along it
    model  columns of the weights

The parameters are gathered where a step needs them and their gradient is scattered again, by the compiler.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from edgespeech.errors import InputError
from edgespeech.types import Array, Float

ROWS = PartitionSpec(("data", "fsdp"))
VECTOR = PartitionSpec("fsdp")
Tree = TypeVar("Tree")
Vector = Float[Array, "w"]


def make_mesh(fsdp: int = 1, model_parallel: int = 1) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `model` over all devices of all processes.

    Args:
        fsdp: parts that the training state is cut into.
        model_parallel: parts that the columns of the weights are cut into; they lie on devices of one process.

    Raises:
        InputError: the devices cannot be divided so.
    """
    # By process: the rows of one process are one block, as `BatchSource.host_slice` cuts them.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    for name, value, count, of in (
        ("model_parallel", model_parallel, jax.local_device_count(), "the devices of one process"),
        ("fsdp", fsdp, len(devices) // max(1, model_parallel), "the devices over --model_parallel"),
    ):
        if value < 1 or count % value:
            raise InputError(f"--{name}={value}: give a divisor of {count}, {of}")
    shape = (len(devices) // (fsdp * model_parallel), fsdp, model_parallel)
    return Mesh(
        np.asarray(devices).reshape(shape),
        ("data", "fsdp", "model"),
        axis_types=(AxisType.Auto,) * 3,
    )


def row_shards(mesh: Mesh) -> int:
    """Parts that a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_rows(batch: Tree, mesh: Mesh) -> Tree:
    """The batch of all processes from the rows of each: cuts the first axis of every array along `data` and `fsdp`."""
    sharding = NamedSharding(mesh, ROWS)
    put = functools.partial(jax.make_array_from_process_local_data, sharding)
    return jax.tree.map(lambda rows: put(np.asarray(rows)), batch)


class Layout:
    """Where the training state lies: vectors as long as the parameters are cut along `fsdp`, all else is everywhere.

    A vector that `fsdp` does not divide has zeros after its end; the step does not see them.

    Args:
        mesh: see `make_mesh`.
        state: a training state, for its structure and shapes.
        size: length of the vectors.
    """

    def __init__(self, mesh: Mesh, state: Any, size: int):
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._is_vector = jax.tree.map(lambda leaf: leaf.shape == (size,), state)
        self._size, self._zeros = size, -size % mesh.shape["fsdp"]
        cut = NamedSharding(mesh, VECTOR)
        self._shardings = jax.tree.map(
            lambda vector: cut if vector else self._everywhere, self._is_vector
        )
        self._mesh = mesh

    def place(self, state: Tree) -> Tree:
        """Puts a state that every process has on the devices, in arrays of its own."""

        def put(leaf, vector: bool, sharding: NamedSharding):
            array = np.array(leaf)
            array = np.pad(array, (0, self._zeros)) if vector else array
            return jax.make_array_from_callback(
                array.shape, sharding, lambda index: np.array(array[index])
            )

        return jax.tree.map(put, state, self._is_vector, self._shardings)

    def key(self, seed: int) -> Array:
        """The random key of a seed, everywhere."""
        return jax.jit(lambda: jax.random.key(seed), out_shardings=self._everywhere)()

    def jit(self, step_function: Callable, donate: bool = True) -> Callable:
        """The step for states that lie so, compiled when it is called; its metrics are everywhere.

        The state that it gets is used up, or without `donate` stays alive beside the new one.
        """
        jitted = self._jitted(step_function, donate)

        def call(state, batch, key):
            with jax.set_mesh(self._mesh):
                return jitted(state, batch, key)

        return call

    def compiler(self, step_function: Callable, donate: bool = True) -> Callable:
        """What compiles the same step for the shapes of `(state, batch, key)`, without a call of it."""
        jitted = self._jitted(step_function, donate)

        def compile_for(state, batch, key):
            with jax.set_mesh(self._mesh):
                return jitted.lower(state, batch, key).compile()

        return compile_for

    def _jitted(self, step_function: Callable, donate: bool):
        def step(state, batch, key):
            state, metrics = step_function(self._without_zeros(state), batch, key)
            return self._with_zeros(state), metrics

        return jax.jit(
            step,
            donate_argnums=0 if donate else (),
            out_shardings=(self._shardings, self._everywhere),
        )

    def whole(self, state: Tree) -> Tree:
        """The state as every process has it for itself, on its first device."""
        whole = jax.jit(self._without_zeros, out_shardings=self._everywhere)(state)
        return jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf.addressable_data(0))), whole)

    def _with_zeros(self, state: Tree) -> Tree:
        def pad(leaf, vector: bool):
            return jnp.pad(leaf, (0, self._zeros)) if vector and self._zeros else leaf

        return jax.tree.map(pad, state, self._is_vector)

    def _without_zeros(self, state: Tree) -> Tree:
        def cut(leaf, vector: bool):
            return leaf[: self._size] if vector and self._zeros else leaf

        return jax.tree.map(cut, state, self._is_vector)


def gather(vector: Vector) -> Vector:
    """Inside a step: the whole vector on every device."""
    return _constrain(vector, PartitionSpec())


def scatter(vector: Vector) -> Vector:
    """Inside a step: each device has its part of the vector."""
    return _constrain(vector, VECTOR)


def split_columns(tree: Tree) -> Tree:
    """Inside a step: weights are cut along their last axis where `model` divides it; the compiler does the rest."""
    parts = jax.sharding.get_abstract_mesh().shape.get("model", 1)

    def split(leaf):
        if parts == 1 or leaf.ndim < 2 or leaf.shape[-1] % parts:
            return leaf
        return _constrain(leaf, PartitionSpec(*[None] * (leaf.ndim - 1), "model"))

    return jax.tree.map(split, tree)


def _constrain(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    # A step may be computed without a mesh, as in a test of it alone.
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, spec)
