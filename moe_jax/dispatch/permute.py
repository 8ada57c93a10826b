"""Sorting assignments by expert, and the two gathers that move rows there and back.

A plain `x[order]` has a scatter-add as its gradient; a permutation's gradient is a gather by the inverse.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.counting import count_experts


class Order(NamedTuple):
    """Assignments (t, k), numbered t*K + k, sorted by expert; "no expert" last.

    order: int32 [T*K], the assignment in each row. inverse: int32 [T*K], the row of each assignment.
    group_sizes: int32 [E], rows per expert.
    """

    order: jax.Array
    inverse: jax.Array
    group_sizes: jax.Array


def sort_by_expert(expert_ids: jax.Array, experts: int) -> Order:
    """int32 [T, K] ids -> `Order`. The sort is stable, so rows of an expert stay in token order."""
    flat = jnp.where((expert_ids >= 0) & (expert_ids < experts), expert_ids, experts).reshape(-1)
    order = compat.argsort(flat)
    inverse = compat.argsort(order)
    return Order(order, inverse, count_experts(expert_ids, experts))


@jax.custom_vjp
def _gather_rows(x, order, inverse):
    return x[order // (order.shape[0] // x.shape[0])]


def _gather_rows_forward(x, order, inverse):
    return _gather_rows(x, order, inverse), (inverse, jnp.zeros((x.shape[0], 0), x.dtype))


def _gather_rows_backward(residuals, d_rows):
    inverse, like = residuals
    tokens = like.shape[0]
    accumulator = jnp.promote_types(like.dtype, jnp.float32)
    d_x = d_rows[inverse].reshape(tokens, -1, d_rows.shape[-1]).sum(axis=1, dtype=accumulator)
    return d_x.astype(like.dtype), None, None


_gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


def gather_rows(x: jax.Array, order: Order) -> jax.Array:
    """[T, D] tokens -> [T*K, D] rows sorted by expert."""
    return _gather_rows(*compat.vary_alike(x, order.order, order.inverse))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sum_rows(rows, order, inverse, tokens):
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return rows[inverse].reshape(tokens, -1, rows.shape[-1]).sum(1, dtype=wide).astype(rows.dtype)


def _sum_forward(rows, order, inverse, tokens):
    return _sum_rows(rows, order, inverse, tokens), order


def _sum_backward(tokens, order, d_out):
    return d_out[order // (order.shape[0] // tokens)], None, None


_sum_rows.defvjp(_sum_forward, _sum_backward)


def sum_rows(rows: jax.Array, order: Order, tokens: int) -> jax.Array:
    """Rows back to their tokens, summed: [T*K, D] -> [T, D], accumulated in float32 at least."""
    return _sum_rows(*compat.vary_alike(rows, order.order, order.inverse), tokens)


@jax.custom_vjp
def _ungather_rows(rows, order, inverse):
    return rows[inverse]


def _ungather_forward(rows, order, inverse):
    return rows[inverse], order


def _ungather_backward(order, d_out):
    return d_out[order], None, None


_ungather_rows.defvjp(_ungather_forward, _ungather_backward)


def combine_rows(rows: jax.Array, gates: jax.Array, order: Order) -> jax.Array:
    """Rows back to their tokens, weighted and summed: [T*K, D], gates [T, K] -> [T, D].

    The sum is accumulated in float32 at least; the result has the dtype of `rows`.
    """
    tokens, k = gates.shape
    rows = _ungather_rows(*compat.vary_alike(rows, order.order, order.inverse)).reshape(tokens, k, -1)
    accumulator = jnp.promote_types(rows.dtype, jnp.float32)
    # Not a product of matrices: its default precision is bfloat16 on a TPU, TF32 on a GPU.
    y = jnp.sum(rows.astype(accumulator) * gates.astype(accumulator)[..., None], axis=1)
    return y.astype(rows.dtype)
