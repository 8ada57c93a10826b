"""Expert parallelism: tokens to the shards of their experts and back under shard_map. One file per exchange."""

import functools
import logging
from typing import Any, Mapping

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.compat import BATCH_AXES
from moe_jax.dispatch.exchange import all_to_all, gather, ragged
from moe_jax.dispatch.exchange.common import AXIS, Group, RunExperts, run_group
from moe_jax.types import TokenChoice

EXCHANGES = {"gather": gather, "all_to_all": all_to_all, "ragged": ragged}


def resolve_exchange(exchange: str | None = None) -> str:
    """The name of the exchange; "auto" and None are `gather`, whose memory, bytes and time do not depend on the routing.

    The other two send less where the n shards are many beside K, or the routing is even. They have to be asked for, as a
    buffer that overflows costs more than it saved.

    Raises:
      ValueError: the exchange is unknown.
    """
    exchange = "gather" if exchange in (None, "auto") else exchange
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange!r}: one of {', '.join(EXCHANGES)}, auto")
    return exchange


def run_local(x: jax.Array, choice: TokenChoice, weights: Any, run_experts: RunExperts) -> jax.Array:
    """The whole layer on one device: sort, experts, combine. x [T, D] -> [T, D]; weights: a tree of arrays [E, ...]."""

    # NumPy arrays cannot be indexed by traced ones.
    x, choice, weights = jax.tree.map(jnp.asarray, (x, choice, weights))

    def run_rows(x, order, gates):
        return run_experts(x, weights, order, gates)

    return run_group(x, choice, run_rows, _experts(weights)).astype(x.dtype)


def run_sharded(
    mesh,
    x: jax.Array,
    choice: TokenChoice,
    weights: Any,
    weight_specs: Mapping[str, compat.PartitionSpec],
    run_experts: RunExperts,
    *,
    exchange: str | None = None,
    buffer_factor: float = 2.0,
    check: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`run_local` over `mesh`: x [T, D] -> y [T, D], both split over (data, fsdp, expert).

    Where the shards do not divide T, tokens without an expert are added. Beside the exchange's own collectives, forward:
    an all-gather of each weight's D over `fsdp`, an all-reduce of y in float32 over `tensor`, and of rows between the
    sublayers of a stack; backward: their gradients,
    a reduce-scatter over `fsdp` and an all-reduce of d_x and d_gates over `tensor`, and an all-reduce of each weight's
    gradient over the axes that split tokens but not the weight.

    Args:
      mesh: with some of the axes data, fsdp, expert, tensor.
      x, choice: global arrays.
      weights: those of `expert_ffn` by name, or a sequence of such, of a stack.
      weight_specs: how those of a name are split: E over `expert`; D, where it is, over `fsdp`; F over `tensor`. The shards
        must divide what they split.
      run_experts: runs one shard's rows; partial sums over F are allowed, they are added over `tensor`.
      exchange: one of `EXCHANGES`, or None: see `resolve_exchange`.
      buffer_factor: room for rows in `all_to_all` and `ragged`, relative to the balanced share; 0: room for all that can
        come, so that nothing overflows.
      check: whether shard_map checks what is the same on all shards; it cannot see into kernels.

    Returns:
      y, and if `expert` has more than one shard the float32 sums over the mesh of `ExchangeStatistics`, by name.

    Raises:
      ValueError: the exchange is unknown; buffer_factor is negative.
    """
    exchange = resolve_exchange(exchange)
    if buffer_factor < 0:
        raise ValueError(f"buffer_factor={buffer_factor}: at least 0; use 0 for a buffer that holds everything")
    names = tuple(name for name in BATCH_AXES if name in mesh.shape)
    shards, experts, tokens = compat.axis_size(mesh, AXIS), _experts(weights), x.shape[0]
    groups = compat.axis_size(mesh, *names) // shards
    splits = jax.tree.map_with_path(lambda path, _: weight_specs[path[-1].key], weights)
    group = Group(shards, experts // shards, names, groups, groups * compat.axis_size(mesh, "tensor"))

    def shard(x, ids, gates, weights):
        # Varied at the entrance, so that the gradients of tokens and of parts of weights are summed once.
        axes = compat.varying_axes(x, *jax.tree.leaves(weights))
        x, gates, weights = jax.tree.map(lambda a: compat.vary(a, axes), (x, gates, weights))
        weights = jax.tree.map(_whole_width, weights, splits)
        if "tensor" in mesh.shape:
            # Outputs are added over `tensor`, and each of its shards adds the whole bias.
            first = jax.lax.axis_index("tensor") == 0
            once = lambda path, w: jnp.where(first, w, 0) if path[-1].key == "b_out" else w
            weights = jax.tree.map_with_path(once, weights)

        def run_rows(x, order, gates):
            return run_experts(x, weights, order, gates)

        if shards == 1:
            y, sent = run_group(x, TokenChoice(ids, gates), run_rows, experts), {}
        else:
            run = EXCHANGES[exchange].exchange
            y, sent = run(x, TokenChoice(ids, gates), run_rows, group, buffer_factor)
            sent = sent._asdict()
        with jax.named_scope("exchange"):
            y = jax.lax.psum(y, "tensor") if "tensor" in mesh.shape else y
            return y.astype(x.dtype), jax.lax.stop_gradient(sent)

    added = -tokens % (groups * shards)
    if shards > 1:
        local = (tokens + added) // (groups * shards)
        _log(exchange, shards, local, choice.gates.shape[1], x.shape[1], x.dtype, buffer_factor)
    x, ids, gates = (
        jnp.pad(a, ((0, added), (0, 0)), constant_values=fill) if added else a
        for a, fill in ((x, 0), (choice.expert_ids, experts), (choice.gates, 0))
    )
    rows = compat.PartitionSpec(names)
    specs = (rows, rows, rows, splits), (rows, compat.PartitionSpec())
    y, sent = compat.shard_map(shard, mesh, *specs, check=check)(x, ids, gates, weights)
    return y[:tokens], sent


def bytes_sent(
    exchange: str,
    shards: int,
    tokens: int,
    top_k: int,
    width: int,
    dtype=jnp.float32,
    buffer_factor: float = 2.0,
    rows: int | None = None,
) -> float:
    """Bytes of activations that one group of shards sends between its shards in a forward pass; as many in the backward.

    Each of n shards sends its rows, x and their results, to the n - 1 others:

      gather       T_local D values of x, and as many sums in float32
      all_to_all   2 C D values, C = ceil(buffer_factor T_local K / n)
      ragged       2 D values for each assignment to an expert of another shard

    Ids, gates and counts are not counted. A call that falls back sends what `gather` does, and in the backward pass x
    once more.

    Args:
      exchange: one of `EXCHANGES`.
      shards: n.
      tokens: T_local, tokens of one shard.
      top_k: K.
      width: D.
      dtype: of x.
      buffer_factor: as in `run_sharded`.
      rows: assignments in the group to experts of other shards, for `ragged`; None: the most that can be.
    """
    return EXCHANGES[exchange].bytes_sent(shards, tokens, top_k, width, dtype, buffer_factor, rows)


@functools.cache
def _log(exchange, *shape):
    """Once for each shape: what every exchange would send."""
    mega = {name: f"{bytes_sent(name, *shape) / 1e6:.3g}" for name in EXCHANGES}
    text = "exchange: %s over %d shards; MB a layer and pass: gather %s, all_to_all %s, ragged at most %s"
    logging.getLogger(__name__).info(text, exchange, shape[0], *mega.values())


def _experts(weights):
    return jax.tree.leaves(weights)[0].shape[0]


def _whole_width(weight, spec):
    """Collects the parts of D from the shards of `fsdp`."""
    return jax.lax.all_gather(weight, "fsdp", axis=tuple(spec).index("fsdp"), tiled=True) if "fsdp" in spec else weight


__all__ = ["EXCHANGES", "bytes_sent", "resolve_exchange", "run_local", "run_sharded"]
