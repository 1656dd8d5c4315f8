"""How a block's layers and the branch beside them are run: one after another, as one batch, or on two devices (ours).

The equations are those of `ParallelBranch` in every form, h = layers(u) and v = layer(downsample(u)):

    sequential: both in one program, in which the compiler may run them side by side
    batched:    the first layer of the block and the branch's layer as one, vmapped over their stacked parameters;
                the branch's frames are padded to the block's: its layer is twice as dear, its attention four times
    sharded:    `shard_map` over two devices, of which one runs the layers and one the branch; a sum brings h and v
                to both

`batched` pays where a product of small matrices takes as long as one of twice the size; `sharded` where there are two
devices and the frames that they exchange, 2 b n d, take less time than the branch.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from edgespeech.errors import InputError
from edgespeech.nn.conformer import ConformerLayer
from edgespeech.nn.parallel_branch import ParallelBranch, half_lengths
from edgespeech.types import Array, Frames, Lengths

BranchExecution = Literal["sequential", "batched", "sharded"]
AXIS = "branch"


def run_with_branch(
    layers: Sequence[ConformerLayer],
    branch: ParallelBranch,
    x: Frames,
    lengths: Lengths,
    key: Array | None = None,
    execution: BranchExecution = "sequential",
) -> Frames:
    """The layers one after another, and the branch beside them: `[b n d], [b] -> [b n d]`.

    Args:
        layers: of the block, at least one.
        branch: from the block's input to its output.
        x: `[b n d]`, the block's input.
        lengths: `[b]`, valid frames.
        key: a key means training. Dropout draws other masks in `batched` than in `sequential`, from the same rates.
        execution: see above; the result is the same but for rounding.

    Raises:
        InputError: `batched`, and the branch's layer is not built as the block's first one (another mixer); `sharded`,
            in training or with fewer than two devices.
    """
    keys = (None,) * (len(layers) + 1)
    if key is not None:
        keys = tuple(jax.random.split(key, len(keys)))
    if execution == "sequential":
        h = _chain(layers, x, lengths, keys[1:])
        return branch(x, h, lengths, keys[0])
    if execution == "batched":
        return _batched(layers, branch, x, lengths, keys)
    if key is not None:
        raise InputError("branch execution 'sharded' is for inference: train with another one")
    return _sharded(layers, branch, x, lengths)


def _chain(layers, x: Frames, lengths: Lengths, keys: Sequence[Array | None]) -> Frames:
    for layer, key in zip(layers, keys, strict=True):
        x = layer(x, lengths, key)
    return x


def _batched(layers, branch: ParallelBranch, x: Frames, lengths: Lengths, keys) -> Frames:
    first, *rest = layers
    pair = first, branch.layer
    splits = [nnx.split(layer) for layer in pair]
    graphdef = splits[0][0]
    if splits[1][0] != graphdef:
        raise InputError(
            "branch execution 'batched' stacks the branch's layer and the block's first one, and they are not built "
            "alike: give both the same mixer, or choose sequential"
        )

    def run(state, x, lengths, key):
        layer = nnx.merge(graphdef, state)
        y = layer(x, lengths, key)
        return y, nnx.state(layer, nnx.BatchStat)

    u = branch.downsampled(x, lengths)
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in splits))
    frames = jnp.stack([x, _padded(u, x.shape[1])])
    both_lengths = jnp.stack([lengths, half_lengths(lengths)])
    # The order of `pair`; keys[0] is the branch's.
    pair_keys = None if keys[0] is None else jnp.stack([keys[1], keys[0]])
    (h, v), statistics = jax.vmap(run)(states, frames, both_lengths, pair_keys)
    if keys[0] is not None:
        for index, layer in enumerate(pair):
            nnx.update(layer, jax.tree.map(lambda leaf, index=index: leaf[index], statistics))
    h = _chain(rest, h, lengths, keys[2:])
    return branch.combined(h, v[:, : u.shape[1]])


def _sharded(layers, branch: ParallelBranch, x: Frames, lengths: Lengths) -> Frames:
    devices = jax.devices()[:2]
    if len(devices) < 2:
        raise InputError(
            "branch execution 'sharded' needs 2 devices and there is 1: choose sequential or batched"
        )
    graphdef, state = nnx.split((list(layers), branch))
    n, half = x.shape[1], (x.shape[1] + 1) // 2

    def run(state, x, lengths):
        is_block = jax.lax.axis_index(AXIS) == 0

        def run_block(state, x, lengths):
            layers, _ = nnx.merge(graphdef, state)
            return _chain(layers, x, lengths, (None,) * len(layers))

        def run_branch(state, x, lengths):
            _, branch = nnx.merge(graphdef, state)
            u = branch.downsampled(x, lengths)
            return _padded(branch.layer(u, half_lengths(lengths)), n)

        # Told to differ from here on: gradients of what goes in are then summed over the devices.
        own_inputs = jax.lax.pcast((state, x, lengths), AXIS, to="varying")
        own = jax.lax.cond(is_block, run_block, run_branch, *own_inputs)
        nothing = jnp.zeros_like(own)
        mine = jnp.stack([jnp.where(is_block, own, nothing), jnp.where(is_block, nothing, own)])
        h, v = jax.lax.psum(mine, AXIS)
        return nnx.merge(graphdef, state)[1].combined(h, v[:, :half])

    mesh = jax.make_mesh((2,), (AXIS,), devices=devices, axis_types=(AxisType.Auto,))
    everywhere = PartitionSpec()
    program = jax.shard_map(run, mesh=mesh, in_specs=everywhere, out_specs=everywhere)
    return program(state, x, lengths)


def _padded(x: Frames, n: int) -> Frames:
    return jnp.pad(x, ((0, 0), (0, n - x.shape[1]), (0, 0)))
