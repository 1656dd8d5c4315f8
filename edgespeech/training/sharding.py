"""One mesh over the local devices, batches cut along it, everything else copied to each device."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh:
    """A mesh with the axis `data` over all devices of this process."""
    return Mesh(np.asarray(jax.local_devices()), ("data",))


def replicate(tree, mesh: Mesh):
    """Puts a tree of arrays on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_rows(batch, mesh: Mesh):
    """Cuts the first axis of every array into one part a device; it must be a multiple of their number."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
