"""Blocks of rows with a run-time trip count: the work follows sum(group_sizes), in plain JAX on any platform.

Every group is cut into blocks of the largest size and one last block of the smallest size that covers what is left. There
is one loop per size: a while loop updates its carry in place, where a `lax.switch` over sizes would copy it.
"""

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import compat


class Block(NamedTuple):
    """`size` consecutive rows from `start`, of which those in `valid` belong to this block of group `group`.

    group, start: int32 scalars. size: static. valid: bool [size, 1].
    """

    group: jax.Array
    start: jax.Array
    size: int
    valid: jax.Array

    def rows(self, array: jax.Array) -> jax.Array:
        """The block's rows of [M, ...]."""
        return jax.lax.dynamic_slice_in_dim(array, self.start, self.size)

    def valid_rows(self, array: jax.Array) -> jax.Array:
        """The block's rows of [M, X], with 0 for those of another group: 0 * NaN of theirs would be NaN."""
        return jnp.where(self.valid, self.rows(array), jnp.zeros((), array.dtype))

    def of_group(self, array: jax.Array) -> jax.Array:
        """array[group]."""
        return jax.lax.dynamic_index_in_dim(array, self.group, keepdims=False)

    def write(self, array: jax.Array, values: jax.Array) -> jax.Array:
        """[M, X] with the valid rows replaced by `values` [size, X]."""
        values = jnp.where(self.valid, values.astype(array.dtype), self.rows(array))
        return jax.lax.dynamic_update_slice_in_dim(array, values, self.start, 0)

    def add_to_group(self, array: jax.Array, value: jax.Array) -> jax.Array:
        """[E, ...] with `value` added to array[group]."""
        value = self.of_group(array) + value.astype(array.dtype)
        return jax.lax.dynamic_update_index_in_dim(array, value, self.group, 0)


def block_sizes(rows: int, groups: int) -> tuple[int, ...]:
    """Sizes of blocks, ascending, at most 8: multiples of a step that is a quarter of an even group or less.

    On 2 CPU cores a product of 64 rows runs at half the rate of one of 512, and a step of 64 wastes 32 rows a group. Every
    size costs compilation, so that little work has two.
    """
    even = rows / max(groups, 1)
    step = 64 if even >= 192 else 32 if even >= 24 else 16 if even >= 12 else 8
    most = min(8 * step, max(step, int(4 * even)), rows)
    sizes = tuple(range(step, most + 1, step)) or (rows,)
    return sizes if rows >= 1024 else tuple(sorted({sizes[0], sizes[-1]}))


def for_each_block(group_sizes: jax.Array, rows: int, body: Callable[[Any, Block], Any], carry: Any) -> Any:
    """carry = body(carry, block) over the blocks of all groups, in no promised order.

    Args:
      group_sizes: integer [E] with a sum of at most `rows`.
      rows: M > 0.
      body: traced once for every size of `block_sizes`.
      carry: pytree of arrays; inside a shard_map they vary over the axes of `group_sizes` at least.
    """
    group_sizes = group_sizes.astype(jnp.int32)
    sizes = block_sizes(rows, group_sizes.shape[0])
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    whole, rest = group_sizes // sizes[-1], group_sizes % sizes[-1]
    fits = jnp.sum(rest[:, None] > jnp.asarray(sizes, jnp.int32), axis=1)
    for i, size in enumerate(sizes):
        last = (fits == i) & (rest > 0)
        count = last.astype(jnp.int32) + (whole if size == sizes[-1] else 0)
        until = jnp.cumsum(count)

        def step(n, carry, size=size, count=count, until=until):
            group = jnp.sum(until <= n, dtype=jnp.int32)  # a searchsorted would be a loop inside the loop
            nth = n - (until[group] - count[group])
            first = starts[group] + (nth if size == sizes[-1] else whole[group]) * sizes[-1]
            # Blocks do not reach past the last row: there they start earlier, and the rows before `first` are not theirs.
            start = jnp.minimum(first, rows - size)
            index = start + jnp.arange(size)
            valid = (index >= first) & (index < ends[group])
            return body(carry, Block(group, start, size, valid[:, None]))

        carry = jax.lax.fori_loop(0, until[-1], step, carry)
    return carry


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Product of two matrices that contracts axes[0] of `a` with axes[1] of `b`, in float32 at least."""
    accumulator = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=accumulator)


def rows_times_groups(lhs, rhs, group_sizes, out_dtype, *, transposed=False):
    """[M, D] x [E, D, F] -> [M, F], or with `transposed` [M, F] x [E, D, F] -> [M, D]."""
    rows, width = lhs.shape[0], rhs.shape[1 if transposed else 2]
    out = compat.zeros((rows, width), out_dtype, like=lhs)
    if rows == 0:
        return out

    def body(out, block):
        # Not `valid_rows`: a row of another group may spoil its own row of the product only, and that is not written.
        return block.write(out, dot(block.rows(lhs), block.of_group(rhs), (1, 1 if transposed else 0)))

    return for_each_block(group_sizes, rows, body, out)


def group_products(lhs, d_out, group_sizes, out_dtype):
    """[M, D], [M, F] -> [E, D, F]: the sum over each group's rows of lhs^T d_out."""
    accumulator = jnp.promote_types(lhs.dtype, jnp.float32)
    out = compat.zeros((group_sizes.shape[0], lhs.shape[1], d_out.shape[1]), accumulator, like=lhs)
    if lhs.shape[0] == 0:
        return out.astype(out_dtype)

    def body(out, block):
        return block.add_to_group(out, dot(block.valid_rows(lhs), block.valid_rows(d_out), (0, 0)))

    return for_each_block(group_sizes, lhs.shape[0], body, out).astype(out_dtype)
