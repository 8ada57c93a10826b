"""All-to-all with a fixed capacity C per pair of shards: a shard sends each other one C rows, used or not.

C = ceil(buffer_factor * T_local * K / n). If on any shard of the mesh more than C rows go one way, the whole mesh takes
the gather exchange for this call: no row is dropped. Every assignment travels by itself; gates stay at home. Over the
axis `expert`, of n shards:

    forward    all-gather of int32 [E] sizes, all-reduce of 2 integers over the axes that split the tokens;
               all-to-all of rows [n C, D] there and of their results back
    backward   the same two all-to-alls, of gradients

in the branch that is taken; the other holds the collectives of the gather exchange, whose forward pass it repeats in the
backward pass.
"""

import jax
import jax.numpy as jnp

from moe_jax.dispatch.exchange import gather
from moe_jax.dispatch.exchange.common import (
    AXIS,
    ExchangeStatistics,
    Group,
    RunRows,
    all_sizes,
    buffer_rows,
    pair_sizes,
    run_or_fall_back,
    run_received,
    starts,
)
from moe_jax.dispatch.permute import Order, combine_rows, gather_rows, sort_by_expert
from moe_jax.ops.precision import accumulator
from moe_jax.types import TokenChoice


def exchange(x: jax.Array, choice: TokenChoice, run_rows: RunRows, group: Group, buffer_factor: float):
    """One shard's part: x [T_local, D], choice over E -> (y [T_local, D] in float32 at least, `ExchangeStatistics`)."""
    (tokens, k), (n, e) = choice.gates.shape, (group.shards, group.experts_local)
    capacity = pair_capacity(tokens, k, n, buffer_factor)
    with jax.named_scope("sort"):
        order = sort_by_expert(choice.expert_ids, n * e)
    with jax.named_scope("exchange"):
        sizes, me = all_sizes(order), jax.lax.axis_index(AXIS)
        going = pair_sizes(sizes, group)[me]

    def run():
        with jax.named_scope("sort"):
            slots = _slots(order, choice.expert_ids // e, going, capacity)
            rows = gather_rows(x, slots)
        with jax.named_scope("exchange"):
            rows = jax.lax.all_to_all(rows, AXIS, 0, 0, tiled=True)
            ids = _received_ids(sizes.reshape(n, n, e)[:, me], capacity)
        rows = run_received(rows, ids, run_rows, e)
        with jax.named_scope("exchange"):
            rows = jax.lax.all_to_all(rows, AXIS, 0, 0, tiled=True)
        with jax.named_scope("combine"):
            return combine_rows(rows, choice.gates, slots, accumulator(x.dtype))

    over, away = jnp.sum(jnp.maximum(going - capacity, 0)), jnp.sum(going) - going[me]
    y, over, _, fell = run_or_fall_back(
        run, lambda: gather.run_gathered(x, choice, run_rows, group), over, away, capacity < tokens * k, group
    )
    shape = n, tokens, k, x.shape[1], x.dtype
    sent = group.copies * jnp.where(fell, gather.bytes_sent(*shape), bytes_sent(*shape, buffer_factor))
    return y, ExchangeStatistics(*(a.astype(jnp.float32) for a in (fell, over, sent)))


def pair_capacity(tokens: int, top_k: int, shards: int, buffer_factor: float) -> int:
    """C for T_local tokens."""
    return buffer_rows(tokens * top_k / shards, tokens * top_k, buffer_factor)


def bytes_sent(shards, tokens, top_k, width, dtype, buffer_factor, rows=None) -> float:
    """See `moe_jax.dispatch.exchange.bytes_sent`."""
    slots = shards * (shards - 1) * pair_capacity(tokens, top_k, shards, buffer_factor)
    return float(2 * slots * width * jnp.dtype(dtype).itemsize)


def _slots(order, shard_ids, going, capacity) -> Order:
    """Slot (j, c) holds the c-th of this shard's rows for shard j, M = n C. shard_ids: [T, K], n or more: none."""
    assignments, n = order.inverse.shape[0], going.shape[0]
    first = starts(going)
    column = jnp.arange(capacity, dtype=jnp.int32)
    row = jnp.minimum(first[:, None] + column, assignments - 1)
    held = jnp.where(column < going[:, None], order.order[row], assignments).reshape(-1)
    shard = shard_ids.reshape(-1)
    place = order.inverse - first[jnp.clip(shard, 0, n - 1)]
    sent = (shard >= 0) & (shard < n) & (place < capacity)
    return Order(held, jnp.where(sent, shard * capacity + place, n * capacity), order.group_sizes)


def _received_ids(sizes, capacity):
    """sizes [n, E_local] from each shard -> [n C] local expert of each slot; E_local: empty."""
    ends = jnp.cumsum(sizes, axis=1, dtype=jnp.int32)[:, None]
    # Compare and sum; expert e's rows end at ends[e].
    return jnp.sum(jnp.arange(capacity)[:, None] >= ends, axis=2, dtype=jnp.int32).reshape(-1)
