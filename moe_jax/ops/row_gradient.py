"""Gradients of large tables by rows, in factors: what a table of N rows gets from T tokens that each touched R of them.

Row n of the gradient is the sum of weights[t, r] * vectors[t] over all (t, r) with ids[t, r] = n. The factors hold T
(R M + M D) numbers. Neither [N, M, D] nor [T, R, M, D] is ever formed: after one sort of the ids, rows are added up
a block at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.precision import accumulator, batched_product

# Bytes of summed rows in memory at once, by platform.
BLOCK_BYTES = {"cpu": 2**21, "other": 2**27}
# A table is summed up as an array (`WholeRows`) where it is touched by at least so many pairs for each of its N rows; 0: never.
WHOLE_PAIRS = {"cpu": 4, "other": 0}
# By products of matrices where N is at most so many times R: sorting the pairs and adding up row by row takes longer.
PRODUCT_ROWS = {"cpu": 32, "other": 0}
# Bytes of a matrix [T, N] of such a product.
MATRIX_BYTES = 2**21
# Bytes of the rows that a function gets in one call. A block of pairs holds fewer rows than pairs; calls for the places that no
# row takes are left out. "other": one call for each block, which does not wait for a number of calls.
CALL_BYTES = {"cpu": 2**18, "other": 2**62}


class RowSink(NamedTuple):
    """Zeros whose gradient is a table's gradient in factors: weights [T, R, M] and vectors [T, M, D]."""

    weights: jax.Array
    vectors: jax.Array


class RowGradient(NamedTuple):
    """ids int32 [T, R], N or more for "no row"; weights [T, R, M]; vectors [T, M, D]."""

    ids: jax.Array
    weights: jax.Array
    vectors: jax.Array


class SortedRows(NamedTuple):
    """A `RowGradient` with its pairs (t, r) in the order of their ids, in blocks of C.

    The pairs of a row follow each other and may cross the end of a block. A block has S >= C+1 sums of pairs: sum 0
    continues the row that the block before did not finish, and each other sum begins a row.

    ids int32 [blocks, S]: the row of each sum that ends in the block; for the others a number past the table, all different.
      S is a multiple of the rows of a call of `fold_rows`.
    slots int32 [blocks, C]: the sum that each pair is added to. places int32 [blocks, C]: the pair, t R + r. weights [T R, M],
    vectors [T, M, D].
    """

    ids: jax.Array
    slots: jax.Array
    places: jax.Array
    weights: jax.Array
    vectors: jax.Array


class WholeRows(NamedTuple):
    """A table's gradient as an array. rows [N, M, D]; touched bool [N]: whether the row has a pair, be its weight 0."""

    rows: jax.Array
    touched: jax.Array


def join_rows(gradient: RowGradient, table_rows: int) -> SortedRows | WholeRows:
    """The gradient of a table of N = `table_rows` rows in the form that takes less time: see WHOLE_PAIRS and PRODUCT_ROWS."""
    least, (_, retrieved) = compat.for_platform(WHOLE_PAIRS), gradient.ids.shape
    if not least or gradient.ids.size < least * table_rows:
        return sort_rows(gradient, table_rows)
    if table_rows <= compat.for_platform(PRODUCT_ROWS) * retrieved:
        touched = jnp.zeros(table_rows, bool).at[gradient.ids.reshape(-1)].set(True, mode="drop")
        return WholeRows(_product_rows(gradient, table_rows), touched)
    dtype = jnp.result_type(gradient.weights, gradient.vectors)
    whole = WholeRows(jnp.zeros((table_rows, *gradient.vectors.shape[1:]), dtype), jnp.zeros(table_rows, bool))

    def put(whole, ids, rows):
        at = lambda array, values: array.at[ids].set(values, mode="drop", unique_indices=True)
        return WholeRows(at(whole.rows, rows), at(whole.touched, True))

    return fold_rows(put, whole, sort_rows(gradient, table_rows))


def _product_rows(gradient: RowGradient, table_rows: int) -> jax.Array:
    """[N, M, D]: for each m the matrix of weights [T, N], transposed, times the vectors, a few tokens at a time."""
    tokens, (_, m, d) = gradient.ids.shape[0], gradient.vectors.shape
    dtype = jnp.result_type(gradient.weights, gradient.vectors)
    blocks = -(-tokens * table_rows * dtype.itemsize // MATRIX_BYTES)
    fill = -tokens % blocks

    def split(array, value=0):
        widths = [(0, fill)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, widths, constant_values=value).reshape(blocks, -1, *array.shape[1:])

    def add_block(rows, part):
        ids, weights, vectors = part
        # Transposed, [D, N]: XLA's products on a CPU take half the time that way round.
        products = [batched_product("tn,td->dn", add_at(ids, weights[..., i], table_rows), vectors[:, i]) for i in range(m)]
        return [row + product.astype(dtype) for row, product in zip(rows, products)], None

    parts = split(gradient.ids, table_rows), split(gradient.weights.astype(dtype)), split(gradient.vectors.astype(dtype))
    zeros = compat.vary(jnp.zeros((d, table_rows), dtype), compat.varying_axes(*gradient))
    return jnp.stack([row.T for row in jax.lax.scan(add_block, [zeros] * m, parts)[0]], axis=1)


def add_at(ids: jax.Array, values: jax.Array, columns: int) -> jax.Array:
    """[T, R] values -> [T, N], each added in the column of its id; ids of N or more are left out."""
    tokens = jnp.arange(ids.shape[0], dtype=ids.dtype)[:, None]
    zeros = compat.zeros((ids.shape[0], columns), values.dtype, like=values)
    return zeros.at[tokens, ids].add(values, mode="drop")


def sort_rows(gradient: RowGradient, table_rows: int) -> SortedRows:
    """Sorts the gradient of a table of N = `table_rows` rows, stably, so that sums have one order."""
    ids, weights, vectors = gradient
    pairs, (_, m, d) = ids.size, vectors.shape
    flat = jnp.where(ids < table_rows, ids, table_rows).reshape(-1).astype(jnp.int32)
    # Even blocks, and at least one place left for an id past the table, which ends the last row.
    row_bytes = m * d * vectors.dtype.itemsize
    blocks = -(-(pairs + 1) // _rows_of(BLOCK_BYTES, row_bytes))
    size = -(-(pairs + 1) // blocks)
    call = min(_rows_of(CALL_BYTES, row_bytes), size + 1)
    sums = -(-(size + 1) // call) * call
    order, fill = stable_order(flat, table_rows), (0, blocks * size - pairs)
    flat = jnp.pad(flat[order], fill, constant_values=table_rows)
    before = jnp.concatenate([jnp.full(1, table_rows, jnp.int32), flat[:-1]])
    slots = jnp.cumsum((flat != before).reshape(blocks, size), axis=1, dtype=jnp.int32)
    block, others = jnp.arange(blocks)[:, None], table_rows + jnp.arange(sums, dtype=jnp.int32)
    named = jnp.tile(others, (blocks, 1)).at[block, slots].set(flat.reshape(blocks, size))
    named = named.at[:, 0].set(before[::size])
    named = jnp.where((jnp.arange(sums) < slots[:, -1:]) & (named < table_rows), named, others)
    places = jnp.pad(order, fill).reshape(blocks, size)
    return SortedRows(named, slots, places, weights.reshape(pairs, m), vectors)


def fold_rows(step: Callable[[Any, jax.Array, jax.Array], Any], carry: Any, rows: SortedRows) -> Any:
    """Hands the rows of a gradient, a block at a time and each once, to a function.

    Args:
      step: (carry, ids int32 [C], rows [C, M, D]) -> carry. Over all calls every touched row occurs once, with the whole of
        its sum; all other ids of a call are different from each other and at least N, their rows without meaning.
      carry: for the first call.
      rows: from `sort_rows`.

    Returns:
      The last carry.
    """
    sums_of_block, m = rows.ids.shape[1], rows.weights.shape[1]
    retrieved = rows.weights.shape[0] // max(rows.vectors.shape[0], 1)
    dtype = jnp.result_type(rows.weights, rows.vectors)
    call = min(_rows_of(CALL_BYTES, m * rows.vectors.shape[2] * rows.vectors.dtype.itemsize), sums_of_block)

    def add_block(carried, block):
        carry, open_row = carried
        ids, slots, places = block
        shares = rows.weights[places][:, :, None] * rows.vectors[places // retrieved]
        sums = jax.ops.segment_sum(shares, slots, sums_of_block, indices_are_sorted=True).at[0].add(open_row)
        if call == sums_of_block:
            return (step(carry, ids, sums), sums[slots[-1]]), None

        def hand_over(i, carry):
            return step(carry, *(jax.lax.dynamic_slice_in_dim(a, i * call, call) for a in (ids, sums)))

        # Sums from the last slot on do not end here.
        return (jax.lax.fori_loop(0, -(-slots[-1] // call), hand_over, carry), sums[slots[-1]]), None

    start = (carry, jnp.zeros((m, rows.vectors.shape[2]), dtype))
    axes = compat.varying_axes(*rows)
    start = jax.tree.map(lambda a: compat.vary(a, axes), start)
    return jax.lax.scan(add_block, start, (rows.ids, rows.slots, rows.places))[0][0]


def squared_norm(rows: SortedRows | WholeRows, table_rows: int) -> jax.Array:
    """The sum of squares of the gradient of a table of N = `table_rows` rows; float32 scalar at least."""
    if isinstance(rows, WholeRows):
        return jnp.sum(jnp.square(rows.rows.astype(accumulator(rows.rows.dtype))))
    wide = accumulator(jnp.result_type(rows.weights, rows.vectors))

    def add(total, ids, sums):
        squares = jnp.sum(jnp.square(sums.astype(wide)), axis=(1, 2))
        return total + jnp.sum(jnp.where(ids < table_rows, squares, 0))

    return fold_rows(add, jnp.zeros((), wide), rows)


def dense_rows(gradient: RowGradient, table_rows: int) -> jax.Array:
    """The gradient as an array [N, M, D]."""
    dtype = jnp.result_type(gradient.weights, gradient.vectors)
    zeros = jnp.zeros((table_rows, *gradient.vectors.shape[1:]), dtype)
    put = lambda table, ids, rows: table.at[ids].set(rows, mode="drop", unique_indices=True)
    return fold_rows(put, zeros, sort_rows(gradient, table_rows))


def stable_order(ids: jax.Array, largest: int) -> jax.Array:
    """Stable argsort of [P] of integers from 0 to `largest`, int32 [P].

    On a CPU by radix: one word holds a digit and the place, and words alone sort four times faster than pairs.
    """
    place_bits = max(ids.size - 1, 1).bit_length()
    digit_bits = 32 - place_bits
    if compat.target_platform() != "cpu" or 4 * digit_bits < largest.bit_length():
        return compat.argsort(ids)
    places, order = jnp.arange(ids.size, dtype=jnp.uint32), None
    for shift in range(0, max(largest.bit_length(), 1), digit_bits):
        digits = (ids if order is None else ids[order]).astype(jnp.uint32) >> shift
        words = jax.lax.sort(digits << place_bits | places, is_stable=False)  # the shift drops the higher digits
        moved = (words & jnp.uint32(2**place_bits - 1)).astype(jnp.int32)
        order = moved if order is None else order[moved]
    return order


def _rows_of(limit: dict[str, int], row_bytes: int) -> int:
    return max(1, compat.for_platform(limit) // row_bytes)
