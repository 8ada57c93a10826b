"""Sorting assignments by expert, and the two gathers that move rows there and back.

A plain `x[order]` has a scatter-add as its gradient; a permutation's gradient is a gather by the inverse.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.counting import count_experts
from moe_jax.ops.precision import accumulator, standard_promotion


class Order(NamedTuple):
    """Which assignment (t, k), numbered t*K + k, stands in which row.

    order: int32 [M], the assignment in each row; T*K: none, the row is 0. inverse: int32 [T*K], the row of each
    assignment; M: none. group_sizes: int32 [E], rows per expert.
    """

    order: jax.Array
    inverse: jax.Array
    group_sizes: jax.Array


def sort_by_expert(expert_ids: jax.Array, experts: int) -> Order:
    """int32 [T, K] ids -> `Order` with M = T*K, by expert, "no expert" last.

    The sort is stable, so rows of an expert stay in token order.
    """
    flat = jnp.where((expert_ids >= 0) & (expert_ids < experts), expert_ids, experts).reshape(-1)
    rows, place = flat.shape[0], jnp.arange(flat.shape[0], dtype=jnp.int32)
    if (experts + 1) * rows < 2**31:
        # One key that holds both sorts 4 times as fast on a CPU as two.
        order = jax.lax.sort(flat.astype(jnp.int32) * rows + place) % max(rows, 1)
    else:
        order = compat.argsort(flat)
    inverse = compat.zeros((rows,), jnp.int32, like=order).at[order].set(place, unique_indices=True)
    return Order(order, inverse, count_experts(expert_ids, experts))


_take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _gather_rows(x, order, inverse):
    return _take(x, order // (inverse.shape[0] // x.shape[0]))


def _gather_rows_forward(x, order, inverse):
    return _gather_rows(x, order, inverse), (inverse, jnp.zeros((x.shape[0], 0), x.dtype))


@standard_promotion()
def _gather_rows_backward(residuals, d_rows):
    inverse, like = residuals
    tokens = like.shape[0]
    d_x = _take(d_rows, inverse).reshape(tokens, -1, d_rows.shape[-1]).sum(axis=1, dtype=accumulator(like.dtype))
    return d_x.astype(like.dtype), None, None


_gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


def gather_rows(x: jax.Array, order: Order) -> jax.Array:
    """[T, D] tokens -> [M, D] rows."""
    return _gather_rows(*compat.vary_alike(x, order.order, order.inverse))


@jax.custom_vjp
def _ungather_rows(rows, order, inverse):
    return _take(rows, inverse)


def _ungather_forward(rows, order, inverse):
    return _take(rows, inverse), order


@standard_promotion()
def _ungather_backward(order, d_out):
    return _take(d_out, order), None, None


_ungather_rows.defvjp(_ungather_forward, _ungather_backward)


def ungather_rows(rows: jax.Array, order: Order) -> jax.Array:
    """[M, D] rows -> [T*K, D], one for each assignment."""
    return _ungather_rows(*compat.vary_alike(rows, order.order, order.inverse))


def add_up_rows(rows: jax.Array, weights: jax.Array | None, order: Order, tokens: int) -> jax.Array:
    """Rows [M, D], each times its weight of [M] or 1, added up to their tokens: [T, D] in float32 at least."""
    wide = accumulator(rows.dtype)
    rows = rows if weights is None else rows.astype(wide) * weights.astype(wide)[:, None]
    return jnp.sum(ungather_rows(rows, order).reshape(tokens, -1, rows.shape[1]), axis=1, dtype=wide)


def combine_rows(rows: jax.Array, gates: jax.Array, order: Order, dtype=None) -> jax.Array:
    """Rows back to their tokens, weighted and summed: [M, D], gates [T, K] -> [T, D].

    The sum is accumulated in float32 at least; the result has the dtype of `rows` unless `dtype` is given.
    """
    tokens, k = gates.shape
    wide = accumulator(rows.dtype)
    out = ungather_rows(rows, order).reshape(tokens, k, -1)
    # Not a product of matrices: its default precision is bfloat16 on a TPU, TF32 on a GPU.
    y = jnp.sum(out.astype(wide) * gates.astype(wide)[..., None], axis=1)
    return y.astype(dtype or rows.dtype)
