"""Counting assignments, their rows and their slots."""

import math

import jax
import jax.numpy as jnp


def count_experts(expert_ids: jax.Array, experts: int) -> jax.Array:
    """int32 [..., K] ids -> int32 [E] assignments per expert; ids outside 0..E-1 are not counted."""
    # Compare and sum: a bincount is a serial scatter on most backends.
    return jnp.sum(expert_ids.reshape(-1, 1) == jnp.arange(experts), axis=0, dtype=jnp.int32)


def real_rows(rows: int, group_sizes: jax.Array) -> jax.Array:
    """bool [M, 1]: whether each of the M = `rows` rows is in a group; the tail past sum(group_sizes) is not."""
    return (jnp.arange(rows) < jnp.sum(group_sizes))[:, None]


def one_hot_sum(ids: jax.Array, columns: int) -> jax.Array:
    """int32 [T, K] -> int32 [T, N]: how often each column stands in each row; other ids are not counted."""
    return jnp.sum(ids[..., None] == jnp.arange(columns), axis=1, dtype=jnp.int32)


def slots_per_expert(factor: float, tokens: int, top_k: int, experts: int) -> int:
    """C = ceil(factor * T * K / E), at least 1 and at most T.

    T counts positions: C is a static shape, the same however many of them are padding, which takes no slot.
    """
    # 1.1 * 100 is a little above 110: rounded, so that the error of a product does not buy a slot.
    return min(tokens, max(1, math.ceil(round(factor * tokens * top_k / experts, 6))))
