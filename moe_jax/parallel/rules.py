"""Arrays placed on a mesh: parameters as `moe_jax.sharding.RULES` say, batches over the axes that split them."""

import logging
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding

from moe_jax import compat
from moe_jax.compat import BATCH_AXES, PartitionSpec
from moe_jax.sharding import mesh_axis


def partition_spec(path: str, shape: tuple[int, ...], names: tuple[str | None, ...], mesh) -> PartitionSpec:
    """Where a parameter of this shape and these logical axes is split.

    A dimension that its mesh axis does not divide (a vocabulary of 257 over 2 shards) stays whole, which is logged.

    Raises:
      ValueError: two dimensions ask for one mesh axis.
    """
    axes = [mesh_axis(name) for name in names]
    used = [axis for axis in axes if axis]
    if len(set(used)) != len(used):
        raise ValueError(f"{path}: logical axes {names} ask twice for one mesh axis")
    for i, (size, axis) in enumerate(zip(shape, axes)):
        if axis and size % compat.axis_size(mesh, axis):
            logging.getLogger(__name__).info("%s: %s=%d is not split over %s", path, names[i], size, axis)
            axes[i] = None
    return PartitionSpec(*axes)


def shardings_of(boxed: Any, mesh) -> Any:
    """A NamedSharding for every leaf of a tree from `jax.eval_shape(model.init, ...)`; leaves without names are replicated."""

    def sharding(path, leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return replicated(mesh)
        spec = partition_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.value.shape, leaf.names, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def replicated(mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh, batch_size: int) -> NamedSharding:
    """Rows split over (data, fsdp, expert); whole on every device if `batch_size` does not divide."""
    if batch_size % compat.axis_size(mesh, *BATCH_AXES):
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(mesh, batch_size: int) -> slice:
    """The rows of the global batch that this process must supply: the span of its devices' rows."""
    indices = batch_sharding(mesh, batch_size).addressable_devices_indices_map((batch_size,)).values()
    return slice(
        min(index[0].start or 0 for index in indices),
        max(batch_size if index[0].stop is None else index[0].stop for index in indices),
    )


def put_batch(batch: dict[str, np.ndarray], mesh, batch_size: int) -> dict[str, jax.Array]:
    """Global arrays [B, ...] from this process's rows (`local_rows`) of the global batch."""
    sharding, first = batch_sharding(mesh, batch_size), local_rows(mesh, batch_size).start

    def place(local):
        shape = (batch_size, *local.shape[1:])

        def rows(index):
            start, stop, _ = index[0].indices(batch_size)
            return local[start - first : stop - first]

        return jax.make_array_from_callback(shape, sharding, rows)

    return {name: place(array) for name, array in batch.items()}
