"""Retrieval from a table that lies on several devices, under shard_map: split by the width D, or by the experts N.

  width    every device has a slice of all rows, and does its part of every pair of a token and an expert: the load is
           even whatever is retrieved. All-gather of ids and gates, all-to-all of x and y, all-reduce of the
           pre-activations [T, R, M-1]; backward the same with gradients.
  experts  every device has whole rows of some experts. All-gather of x, ids and gates, reduce-scatter of y and the
           pre-activations. Every device goes through all pairs of its group; pairs with another device's expert have a
           gate of 0. This saves memory, not work, and is not meant to be fast.

Both write out the collectives of the forward and the backward pass, so that the residuals are those of one device.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.compat import BATCH_AXES, PartitionSpec
from moe_jax.ops.retrieval import BACKENDS, RetrievalPasses

AXIS = "expert"


@functools.cache
def sharded_passes(mesh, table_spec: PartitionSpec, backend: str = "blocks") -> RetrievalPasses:
    """The passes of `ops.retrieval.retrieve` over `mesh`: tokens split over (data, fsdp, expert), the table over `expert`.

    Where the shards do not divide T, tokens without an expert are added.

    Args:
      mesh: that of `compat.current_mesh`.
      table_spec: how the table [N, M, D] is split; over `expert` either N or D, which the shards must divide.
      backend: what each shard runs, see `ops.retrieval.resolve_backend`. With "width" a kernel runs each pass in two parts, the
        second of which fetches again: between them is the all-reduce.
    """
    local = BACKENDS[backend]
    if compat.axis_size(mesh, AXIS) > 1:
        inside = (_by_experts if table_spec[0] == AXIS else _by_width)(local)
    else:
        inside, table_spec = local, PartitionSpec()
    names = tuple(name for name in BATCH_AXES if name in mesh.shape)
    shards, tokens = compat.axis_size(mesh, *names), PartitionSpec(names)

    def over_shards(run: Callable, outputs: int):
        def call(*args):
            *arrays, table, activation = args
            count, experts = arrays[0].shape[0], table.shape[0]
            arrays = [_pad(a, -count % shards, experts) for a in arrays]
            mapped = compat.shard_map(
                lambda *args: run(*args, activation),
                mesh,
                (*[tokens] * len(arrays), table_spec),
                (tokens,) * outputs,
                check=False,
            )
            return tuple(a[:count] for a in mapped(*arrays, table))

        return call

    return RetrievalPasses(over_shards(inside.forward, 2), over_shards(inside.backward, 3))


def _pad(array, added, experts):
    fill = experts if jnp.issubdtype(array.dtype, jnp.integer) else 0
    widths = [(0, added)] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, widths, constant_values=fill) if added else array


def _whole(array):
    return jax.lax.all_gather(array, AXIS, axis=0, tiled=True)


def _own(array):
    """This shard's part of what all shards of the group have."""
    size = array.shape[0] // jax.lax.axis_size(AXIS)
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(AXIS) * size, size)


def _to_width(array):
    """[T_local, D] of all shards -> [T, D_local]."""
    return jax.lax.all_to_all(array, AXIS, split_axis=1, concat_axis=0, tiled=True)


def _from_width(array):
    return jax.lax.all_to_all(array, AXIS, split_axis=0, concat_axis=1, tiled=True)


def _by_width(local: RetrievalPasses) -> RetrievalPasses:
    add = lambda a: jax.lax.psum(a, AXIS)

    def forward(x, ids, gates, table, activation):
        y, hidden = local.forward(_to_width(x), _whole(ids), _whole(gates), table, activation, reduce=add)
        return _from_width(y), _own(hidden)

    def backward(d_y, x, ids, gates, hidden, table, activation):
        whole = _whole(ids), _whole(gates), _whole(hidden)
        args = _to_width(d_y), _to_width(x), *whole, table, activation
        d_x, d_gates, weights = local.backward(*args, reduce=add)
        return _from_width(d_x), _own(d_gates), _own(weights)

    return RetrievalPasses(forward, backward)


def _by_experts(local: RetrievalPasses) -> RetrievalPasses:
    def scatter(array):
        return jax.lax.psum_scatter(array, AXIS, scatter_dimension=0, tiled=True)

    def local_part(table, ids, *arrays):
        """Ids counted from this shard's first, N_local where the expert is another's; and arrays [T, R, ...] with 0 there."""
        local_ids = ids - jax.lax.axis_index(AXIS) * table.shape[0]
        here = (local_ids >= 0) & (local_ids < table.shape[0])
        masked = [jnp.where(here.reshape(*here.shape, *[1] * (a.ndim - 2)), a, 0) for a in arrays]
        return jnp.where(here, local_ids, table.shape[0]), masked

    def forward(x, ids, gates, table, activation):
        local_ids, (gates,) = local_part(table, _whole(ids), _whole(gates))
        y, hidden = local.forward(_whole(x), local_ids, gates, table, activation)
        _, (hidden,) = local_part(table, _whole(ids), hidden)
        return scatter(y), scatter(hidden)

    def backward(d_y, x, ids, gates, hidden, table, activation):
        local_ids, (gates, hidden) = local_part(table, _whole(ids), _whole(gates), _whole(hidden))
        args = _whole(d_y), _whole(x), local_ids, gates, hidden, table, activation
        d_x, d_gates, weights = local.backward(*args)
        _, (d_gates, weights) = local_part(table, _whole(ids), d_gates, weights)
        return scatter(d_x), scatter(d_gates), scatter(weights)

    return RetrievalPasses(forward, backward)
