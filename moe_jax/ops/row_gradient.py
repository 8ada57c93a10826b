"""Gradients of large tables by rows, in factors: what a table of N rows gets from T tokens that each touched R of them.

Row n of the gradient is the sum over all (t, r) with ids[t, r] = n of weights[t, r] x vectors[t]. The factors take T (R M + M D)
numbers; neither [N, M, D] nor [T, R, M, D] is ever formed: the rows are added up a block at a time, from one sort of the ids.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import compat

# Of summed rows that lie in memory at once.
BLOCK_BYTES = {"cpu": 2**22}
OTHER_BLOCK_BYTES = 2**27


class RowSink(NamedTuple):
    """Zeros whose gradient is a table's gradient in factors: weights [T, R, M] and vectors [T, M, D]."""

    weights: jax.Array
    vectors: jax.Array


class RowGradient(NamedTuple):
    """ids int32 [T, R], N or more for "no row"; weights [T, R, M]; vectors [T, M, D]."""

    ids: jax.Array
    weights: jax.Array
    vectors: jax.Array


def fold_rows(
    step: Callable[[Any, jax.Array, jax.Array], Any], carry: Any, gradient: RowGradient, table_rows: int
) -> Any:
    """Hands the gradient's rows, a block at a time and each once, to a function.

    Args:
      step: (carry, ids int32 [C], rows [C, M, D]) -> carry. Over all calls every touched row occurs once, with the whole of its
        sum; all other ids of a call are different from each other and at least N.
      carry: for the first call.
      gradient: of the table.
      table_rows: N.

    Returns:
      The last carry.
    """
    ids, weights, vectors = gradient
    (tokens, retrieved), (_, m, d) = ids.shape, vectors.shape
    pairs = tokens * retrieved
    dtype = jnp.result_type(weights, vectors)
    flat = jnp.where(ids < table_rows, ids, table_rows).reshape(-1).astype(jnp.int32)
    block = min(_block_rows(m * d * dtype.itemsize), pairs + 1)
    blocks = pairs // block + 1  # at least one place is left for an id past the table, which ends the last row
    order = compat.argsort(flat)
    fill = (0, blocks * block - pairs)
    sorted_ids = jnp.pad(flat[order], fill, constant_values=table_rows).reshape(blocks, block)
    order = jnp.pad(order, fill).reshape(blocks, block)
    weights = weights.reshape(pairs, m)
    places = table_rows + jnp.arange(block + 1, dtype=jnp.int32)

    def one(carried, block_of):
        carry, open_id, open_row = carried
        ids, source = block_of
        rows = weights[source][:, :, None] * vectors[source // retrieved]
        rows = jnp.where((ids < table_rows)[:, None, None], rows, 0)
        first = ids != jnp.concatenate([open_id[None], ids[:-1]])
        segment = jnp.cumsum(first, dtype=jnp.int32)  # 0 goes on with the row that the last block left open
        sums = jax.ops.segment_sum(rows, segment, block + 1, indices_are_sorted=True).at[0].add(open_row)
        names = places.at[segment].set(ids, indices_are_sorted=True).at[0].set(open_id)
        last = segment[-1]
        done = (jnp.arange(block + 1) < last) & (names < table_rows)
        carry = step(carry, jnp.where(done, names, places), jnp.where(done[:, None, None], sums, 0))
        return (carry, ids[-1], sums[last]), None

    start = (carry, jnp.int32(table_rows), jnp.zeros((m, d), dtype))
    return jax.lax.scan(one, start, (sorted_ids, order))[0][0]


def squared_norm(gradient: RowGradient, table_rows: int) -> jax.Array:
    """The sum of squares of the gradient of a table of N = `table_rows` rows; float32 scalar at least."""
    wide = jnp.promote_types(jnp.result_type(gradient.weights, gradient.vectors), jnp.float32)
    add = lambda total, _, rows: total + jnp.sum(jnp.square(rows.astype(wide)))
    return fold_rows(add, jnp.zeros((), wide), gradient, table_rows)


def dense_rows(gradient: RowGradient, table_rows: int) -> jax.Array:
    """The same as an array [N, M, D]."""
    dtype = jnp.result_type(gradient.weights, gradient.vectors)
    zeros = jnp.zeros((table_rows, *gradient.vectors.shape[1:]), dtype)
    put = lambda table, ids, rows: table.at[ids].set(rows, mode="drop", unique_indices=True)
    return fold_rows(put, zeros, gradient, table_rows)


def _block_rows(row_bytes: int) -> int:
    return max(1, BLOCK_BYTES.get(compat.target_platform(), OTHER_BLOCK_BYTES) // row_bytes)
