"""Blocks of rows with a run-time trip count: the work follows sum(group_sizes), in plain JAX on any platform.

A block is `size` consecutive rows that start inside one group. Blocks run in ascending order, so where the
last block of a group overhangs into the next group, the next group's own blocks overwrite those rows; only
the tail needs a mask.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax import compat


def block_size(rows: int, groups: int) -> int:
    """Rows in a block: near a quarter of an even group, so that overhang wastes an eighth of the work."""
    size = 32
    while size < 256 and 4 * size * groups <= rows:
        size *= 2
    return size


def _schedule(group_sizes, size):
    """(number of blocks, function from block number to (group, first row, one past the group's last row))."""
    group_sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(group_sizes)
    block_ends = jnp.cumsum((group_sizes + size - 1) // size)

    def block(i):
        e = jnp.searchsorted(block_ends, i, side="right").astype(jnp.int32)
        before = jnp.where(e > 0, block_ends[e - 1], 0)
        return e, ends[e] - group_sizes[e] + (i - before) * size, ends[e]

    return block_ends[-1], block


def _pad_rows(x, size):
    return jnp.pad(x, ((0, size), (0, 0)))


def _rows_times_groups(lhs, rhs, group_sizes, out_dtype, transposed=False):
    """[M, D] x [E, D, F] -> [M, F], or with `transposed` [M, F] x [E, D, F] -> [M, D]."""
    rows, (groups, d, f) = lhs.shape[0], rhs.shape
    size = block_size(rows, groups)
    accumulator = jnp.promote_types(lhs.dtype, jnp.float32)
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    count, block = _schedule(group_sizes, size)
    lhs = _pad_rows(lhs, size)

    def body(i, out):
        e, start, end = block(i)
        x = jax.lax.dynamic_slice_in_dim(lhs, start, size)
        w = jax.lax.dynamic_index_in_dim(rhs, e, keepdims=False)
        y = jax.lax.dot_general(x, w, contract, preferred_element_type=accumulator)
        y = jnp.where((start + jnp.arange(size) < end)[:, None], y, 0).astype(out_dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

    out = compat.zeros((rows + size, d if transposed else f), out_dtype, like=lhs)
    return jax.lax.fori_loop(0, count, body, out)[:rows]


def _group_gradient(lhs, d_out, group_sizes, groups, dtype):
    """[M, D], [M, F] -> [E, D, F]: the sum over each group's rows of lhs^T d_out."""
    size = block_size(lhs.shape[0], groups)
    accumulator = jnp.promote_types(lhs.dtype, jnp.float32)
    count, block = _schedule(group_sizes, size)
    lhs, d_out = _pad_rows(lhs, size), _pad_rows(d_out, size)

    def body(i, out):
        e, start, end = block(i)
        mine = (start + jnp.arange(size) < end)[:, None]
        # Both sides are masked: 0 * NaN of a neighbouring group would be NaN.
        x = jnp.where(mine, jax.lax.dynamic_slice_in_dim(lhs, start, size), 0)
        g = jnp.where(mine, jax.lax.dynamic_slice_in_dim(d_out, start, size), 0)
        product = jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=accumulator)
        old = jax.lax.dynamic_index_in_dim(out, e, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(out, old + product, e, 0)

    out = compat.zeros((groups, lhs.shape[1], d_out.shape[1]), accumulator, like=lhs)
    return jax.lax.fori_loop(0, count, body, out).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(lhs, rhs, group_sizes, out_dtype):
    """See `moe_jax.ops.grouped_matmul.grouped_matmul`."""
    return _rows_times_groups(lhs, rhs, group_sizes, out_dtype)


def _forward(lhs, rhs, group_sizes, out_dtype):
    return _rows_times_groups(lhs, rhs, group_sizes, out_dtype), (lhs, rhs, group_sizes)


def _backward(out_dtype, residuals, d_out):
    lhs, rhs, group_sizes = residuals
    d_out = d_out.astype(lhs.dtype)
    d_lhs = _rows_times_groups(d_out, rhs, group_sizes, lhs.dtype, transposed=True)
    return d_lhs, _group_gradient(lhs, d_out, group_sizes, rhs.shape[0], rhs.dtype), None


grouped_matmul.defvjp(_forward, _backward)
