"""Blocks of rows with a run-time trip count: the work follows sum(group_sizes), in plain JAX on any platform.

Every group has one block of the smallest size that covers its end, and before it blocks of the largest size. There is one
loop per size: a while loop updates its carry in place, where a `lax.switch` over sizes would copy it.
"""

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.precision import accumulator


class Block(NamedTuple):
    """`size` consecutive rows from `start`, of which those in `valid` belong to this block of group `group`.

    group, start: int32 scalars. size: static. valid: bool [size, 1]. first: static; whether no other block of the group was
    there before. A group without rows has one block of size 0.
    """

    group: jax.Array
    start: jax.Array
    size: int
    valid: jax.Array
    first: bool

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
        """[E, ...] with `value` added to array[group]; the first block finds nothing there, and does not read it."""
        value = value.astype(array.dtype)
        value = value if self.first else self.of_group(array) + value
        return jax.lax.dynamic_update_index_in_dim(array, value, self.group, 0)


def block_sizes(rows: int, groups: int) -> tuple[int, ...]:
    """Sizes of blocks, ascending, at most 16: multiples of a step that is an eighth of an even group or less, and of half of it
    near the even group.

    A group wastes half a step. Every size costs compilation, so that little work has two.
    """
    even = rows / max(groups, 1)
    step = 64 if even >= 512 else 32 if even >= 96 else 16 if even >= 12 else 8
    most = min(12 * step, max(step, int(4 * even)), rows)
    sizes = range(step, most + 1, step) or (rows,)
    if rows < 1024:
        return tuple(sorted({sizes[0], sizes[-1]}))
    near = (n for n in range(step // 2, most, step) if 0.75 <= n / even <= 1.25)
    return tuple(sorted({*sizes, *near}))


def for_each_block(
    group_sizes: jax.Array,
    rows: int,
    body: Callable[[Any, Block], Any],
    carry: Any,
    empty_groups: bool = False,
) -> Any:
    """carry = body(carry, block) over the blocks of all groups, every group's first block before any other block.

    Args:
      group_sizes: integer [E] with a sum of at most `rows`.
      rows: M > 0.
      body: traced once for every size of `block_sizes` and once more.
      carry: pytree of arrays; inside a shard_map they vary over the axes of `group_sizes` at least.
      empty_groups: whether groups without rows have a block, of size 0.
    """
    group_sizes = group_sizes.astype(jnp.int32)
    sizes = block_sizes(rows, group_sizes.shape[0])
    most = sizes[-1]
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    before = jnp.maximum(group_sizes - 1, 0) // most  # blocks of the largest size
    rest = group_sizes - before * most
    fits = jnp.sum(rest[:, None] > jnp.asarray((0, *sizes), jnp.int32), axis=1)

    def loop(carry, size, count, offset, first):
        until = jnp.cumsum(count)

        def step(n, carry):
            group = jnp.sum(until <= n, dtype=jnp.int32)  # a searchsorted would be a loop inside the loop
            begin = starts[group] + offset(group, n - (until[group] - count[group]))
            # Blocks do not reach past the last row: there they start earlier, and the rows before `begin` are not theirs.
            start = jnp.minimum(begin, rows - size)
            index = start + jnp.arange(size)
            valid = (index >= begin) & (index < ends[group])
            return body(carry, Block(group, start, size, valid[:, None], first))

        return jax.lax.fori_loop(0, until[-1], step, carry)

    for i, size in enumerate((0, *sizes)):
        if size or empty_groups:
            count = (fits == i).astype(jnp.int32)
            carry = loop(carry, size, count, lambda group, n: before[group] * most, first=True)
    if rows > most:
        carry = loop(carry, most, before, lambda group, n: n * most, first=False)
    return carry


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Product of two matrices that contracts axes[0] of `a` with axes[1] of `b`, in float32 at least."""
    if axes[0] == 0 and compat.target_platform() == "cpu":
        # XLA's fast product sums over the last axis of `a`: [256, 1024]^T [256, 256] takes a sixth less time with
        # the transposed copy than without. The barrier keeps the copy from being folded into the product.
        a, axes = jax.lax.optimization_barrier(a.T), (1, axes[1])
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=accumulator(a.dtype))


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
    shape = group_sizes.shape[0], lhs.shape[1], d_out.shape[1]
    if lhs.shape[0] == 0:
        return compat.zeros(shape, out_dtype, like=lhs)

    def body(out, block):
        return block.add_to_group(out, dot(block.valid_rows(lhs), block.valid_rows(d_out), (0, 0)))

    out = compat.empty(shape, accumulator(lhs.dtype), like=lhs)
    return for_each_block(group_sizes, lhs.shape[0], body, out, empty_groups=True).astype(out_dtype)
