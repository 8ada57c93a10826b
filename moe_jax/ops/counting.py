"""Counting assignments and their rows."""

import jax
import jax.numpy as jnp


def count_experts(expert_ids: jax.Array, experts: int) -> jax.Array:
    """int32 [..., K] ids -> int32 [E] assignments per expert; ids outside 0..E-1 are not counted."""
    # Compare and sum: a bincount is a serial scatter on most backends.
    return jnp.sum(expert_ids.reshape(-1, 1) == jnp.arange(experts), axis=0, dtype=jnp.int32)


def real_rows(rows: int, group_sizes: jax.Array) -> jax.Array:
    """bool [M, 1]: whether each of the M = `rows` rows is in a group; the tail past sum(group_sizes) is not."""
    return (jnp.arange(rows) < jnp.sum(group_sizes))[:, None]
