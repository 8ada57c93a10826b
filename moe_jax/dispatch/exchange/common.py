"""What the exchanges share: the layer on one shard, received rows, and the fallback where a buffer is too small."""

import math
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.dispatch.permute import Order, gather_rows, sort_by_expert
from moe_jax.types import TokenChoice

AXIS = "expert"
# (x [T, D], weights, order of M = T*K rows, gates [M] or None) -> [T, D] in float32 at least: the sum over a token's rows i
# of what their experts make of it, times gates[i].
RunExperts = Callable[[jax.Array, Any, Order, jax.Array | None], jax.Array]
# The same with this shard's weights: (x, order, gates) -> [T, D]
RunRows = Callable[[jax.Array, Order, jax.Array | None], jax.Array]


class Group(NamedTuple):
    """n shards along the mesh axis `expert` that hold all experts together; all fields are static.

    shards: n. experts_local: E / n; shard i holds the experts from i * E / n on. axes: the mesh axes that split the
    tokens. groups: the number of such groups in the mesh with different tokens. copies: the number of all such groups; along
    `tensor` several hold the same tokens.
    """

    shards: int
    experts_local: int
    axes: tuple[str, ...]
    groups: int
    copies: int


class ExchangeStatistics(NamedTuple):
    """Float32 scalars of one call, the same on all shards: 1 if the call fell back to the gather exchange, else 0;
    rows that no buffer had room for; bytes of activations sent forward between different shards of the mesh."""

    exchange_fallback: jax.Array
    exchange_overflow: jax.Array
    exchange_bytes: jax.Array


def run_group(x: jax.Array, choice: TokenChoice, run_rows: RunRows, experts: int) -> jax.Array:
    """Sort, experts, combine: x [T, D] -> [T, D] in `accumulator(x.dtype)`."""
    with jax.named_scope("sort"):
        order = sort_by_expert(choice.expert_ids, experts)
        gates = gather_rows(choice.gates.reshape(-1, 1), order)[:, 0]
    with jax.named_scope("experts"):
        return run_rows(x, order, gates)


def run_received(rows: jax.Array, ids: jax.Array, run_rows: RunRows, experts: int) -> jax.Array:
    """Rows in any order [M, D] through their experts ids [M], and back to their places; 0 where id = E_local."""
    with jax.named_scope("sort"):
        order = sort_by_expert(ids[:, None], experts)
    with jax.named_scope("experts"):
        return run_rows(rows, order, None).astype(rows.dtype)


def buffer_rows(share: float, worst: int, factor: float) -> int:
    """Rows of a buffer: factor * the balanced share, rounded up, at most the worst case; factor 0: the worst case."""
    return min(worst, max(1, math.ceil(round(factor * share, 6)))) if factor else worst


def all_sizes(order: Order) -> jax.Array:
    """int32 [n, E]: the rows that each shard has for each expert, known to all of them."""
    return jax.lax.all_gather(order.group_sizes, AXIS)


def pair_sizes(sizes: jax.Array, group: Group) -> jax.Array:
    """[n, E] -> [n, n]: rows from shard i for shard j."""
    return sizes.reshape(group.shards, group.shards, group.experts_local).sum(axis=2, dtype=jnp.int32)


def starts(sizes: jax.Array) -> jax.Array:
    """[..., N] sizes of consecutive blocks -> int32 [..., N], where each of them starts."""
    return jnp.cumsum(sizes, axis=-1, dtype=jnp.int32) - sizes


def run_or_fall_back(run, fallback, over: jax.Array, away: jax.Array, may_overflow: bool, group: Group):
    """`run()`, or `fallback()` where any shard of the mesh has rows that found no room.

    Args:
      run, fallback: () -> [T_local, D].
      over: int32, this shard's rows without room.
      away: int32, this shard's rows for others.
      may_overflow: static; False leaves the fallback out of the program.

    Returns:
      y [T_local, D]; the sums of over and away over the mesh's different tokens, int32; whether it fell back.
    """
    over, away = jax.lax.psum(jnp.stack([over, away]), group.axes)
    if not may_overflow:
        return run(), over, away, jnp.zeros((), bool)
    # All shards of the mesh take the same branch: none waits in a collective that another does not enter. The
    # fallback is rare. It is computed again in the backward pass, so that it keeps no residuals beside its inputs.
    y = jax.lax.cond(over > 0, jax.checkpoint(fallback), run)
    return y, over, away, over > 0
