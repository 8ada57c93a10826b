"""`ragged_all_to_all`: only the rows that have to travel do, into one buffer of M rows per shard.

M = ceil(buffer_factor * T_local * K). If any shard of the mesh would receive more, the whole mesh takes the gather
exchange for this call: no row is dropped. Every assignment for another shard travels by itself; gates stay at home.
Over the axis `expert`, of n shards:

    forward    all-gather of int32 [E] sizes, all-reduce of 2 integers over the axes that split the tokens;
               ragged-all-to-all of rows there and of their results back
    backward   the same two ragged-all-to-alls, of gradients

in the branch that is taken; the other holds the collectives of the gather exchange, whose forward pass it repeats in the
backward pass. XLA has no ragged-all-to-all on a CPU: each of them is then an all-gather of the senders' rows
[T_local K, D] or [M, D], of which the same rows go to the same places.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax import compat
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
from moe_jax.dispatch.permute import combine_rows, gather_rows, sort_by_expert
from moe_jax.ops.precision import accumulator, standard_promotion
from moe_jax.types import TokenChoice


def exchange(x: jax.Array, choice: TokenChoice, run_rows: RunRows, group: Group, buffer_factor: float):
    """One shard's part: x [T_local, D], choice over E -> (y [T_local, D] in float32 at least, `ExchangeStatistics`)."""
    (tokens, k), (n, e) = choice.gates.shape, (group.shards, group.experts_local)
    size, worst = receive_buffer(tokens, k, n, buffer_factor), n * tokens * k
    with jax.named_scope("sort"):
        order = sort_by_expert(choice.expert_ids, n * e)
    with jax.named_scope("exchange"):
        sizes, me = all_sizes(order), jax.lax.axis_index(AXIS)
        pairs = pair_sizes(sizes, group)

    def run():
        with jax.named_scope("sort"):
            rows = gather_rows(x, order)
        with jax.named_scope("exchange"):
            rows = move(rows, pairs, size)
            ids = _received_ids(sizes.reshape(n, n, e)[:, me], size)
        rows = run_received(rows, ids, run_rows, e)
        with jax.named_scope("exchange"):
            rows = move(rows, pairs.T, tokens * k)
        with jax.named_scope("combine"):
            return combine_rows(rows, choice.gates, order, accumulator(x.dtype))

    over, away = jnp.maximum(jnp.sum(pairs[:, me]) - size, 0), jnp.sum(pairs[me]) - pairs[me, me]
    y, over, away, fell = run_or_fall_back(
        run, lambda: gather.run_gathered(x, choice, run_rows, group), over, away, size < worst, group
    )
    shape = n, tokens, k, x.shape[1], x.dtype
    sent = bytes_sent(*shape, rows=away.astype(jnp.float32) / group.groups)
    sent = group.copies * jnp.where(fell, gather.bytes_sent(*shape), sent)
    return y, ExchangeStatistics(*(a.astype(jnp.float32) for a in (fell, over, sent)))


def receive_buffer(tokens: int, top_k: int, shards: int, buffer_factor: float) -> int:
    """M for T_local tokens."""
    return buffer_rows(tokens * top_k, shards * tokens * top_k, buffer_factor)


def bytes_sent(shards, tokens, top_k, width, dtype, buffer_factor=0.0, rows=None):
    """See `moe_jax.dispatch.exchange.bytes_sent`."""
    if rows is None:
        rows = tokens * top_k * (shards - 1)
    return rows * (2.0 * width * jnp.dtype(dtype).itemsize)


def move(rows: jax.Array, pairs: jax.Array, size: int) -> jax.Array:
    """Rows to their shards.

    Args:
      rows: [R, D], this shard's, first those for shard 0, then those for shard 1, ...
      pairs: int32 [n, n], how many shard i sends to shard j; the same on all n shards.
      size: M.

    Returns:
      [M, D], first the rows from shard 0, then those from shard 1, ...; then zeros. Its gradient is the way back.
    """
    return _move(*compat.vary_alike(rows, pairs), size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _move(rows, pairs, size):
    return (_emulate if compat.target_platform() == "cpu" else _send)(rows, pairs, size)


def _move_forward(rows, pairs, size):
    return _move(rows, pairs, size), (pairs, jnp.zeros((rows.shape[0], 0), rows.dtype))


@standard_promotion()
def _move_backward(size, residuals, d_out):
    pairs, like = residuals
    return _move(d_out, pairs.T, like.shape[0]), None


_move.defvjp(_move_forward, _move_backward)


def _send(rows, pairs, size):
    me = jax.lax.axis_index(AXIS)
    out = compat.zeros((size, rows.shape[1]), rows.dtype, like=rows)
    # output_offsets: where this shard's block begins on each receiver.
    return jax.lax.ragged_all_to_all(
        rows, out, starts(pairs)[me], pairs[me], starts(pairs.T)[:, me], pairs[:, me], axis_name=AXIS
    )


def _emulate(rows, pairs, size):
    me = jax.lax.axis_index(AXIS)
    everything = jax.lax.all_gather(rows, AXIS)
    row = jnp.arange(size, dtype=jnp.int32)
    source = _block_of(row, pairs[:, me])
    sender = jnp.minimum(source, pairs.shape[0] - 1)
    offset = starts(pairs)[sender, me] + row - starts(pairs[:, me])[sender]
    # `source` is out of bounds for the tail.
    return everything.at[source, offset].get(mode="fill", fill_value=0)


def _received_ids(sizes, size):
    """sizes [n, E_local] from each shard -> [M] local expert of each received row; E_local: none."""
    block = _block_of(jnp.arange(size, dtype=jnp.int32), sizes.reshape(-1))
    return jnp.where(block < sizes.size, block % sizes.shape[1], sizes.shape[1])


def _block_of(row, sizes):
    """[M] row numbers, [N] sizes of consecutive blocks -> [M] the block of each row; N: past the last."""
    # Compare and sum, like `count_experts`.
    return jnp.sum(row[:, None] >= jnp.cumsum(sizes, dtype=jnp.int32), axis=1, dtype=jnp.int32)
