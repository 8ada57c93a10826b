"""Limiting the assignments of each expert, without arrays of shape [T, E, C]."""

import math

import jax
import jax.numpy as jnp

from moe_jax.dispatch.permute import sort_by_expert
from moe_jax.types import TokenChoice


def slots_per_expert(factor: float, tokens: int, top_k: int, experts: int) -> int:
    """C = ceil(factor * T * K / E), at least 1 and at most T."""
    # 1.1 * 100 is a little above 110: rounded, so that the error of a product does not buy a slot.
    return min(tokens, max(1, math.ceil(round(factor * tokens * top_k / experts, 6))))


def limit_assignments(choice: TokenChoice, experts: int, capacity: int) -> tuple[TokenChoice, jax.Array]:
    """Keeps the first C assignments of every expert in token order, which is causal.

    Args:
      choice: ids and gates [T, K]; gates of what stays are unchanged.
      experts: E.
      capacity: C.

    Returns:
      The choice, with "no expert" for the rest, and the int32 number of assignments dropped.
    """
    ids = choice.expert_ids
    order = sort_by_expert(ids, experts)
    starts = jnp.cumsum(order.group_sizes) - order.group_sizes
    flat = ids.reshape(-1)
    real = (flat >= 0) & (flat < experts)
    rank = order.inverse - starts[jnp.clip(flat, 0, experts - 1)]
    over = real & (rank >= capacity)
    kept = jnp.where(over, experts, flat).reshape(ids.shape)
    gates = jnp.where(kept == experts, 0, choice.gates)
    return TokenChoice(kept, gates), jnp.sum(over, dtype=jnp.int32)
