"""One optimizer step: gradients over microbatches, clipping, the update, and the routers' own learning."""

from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from moe_jax.config import Config
from moe_jax.config.blocks import RETRIEVING, distinct_layers
from moe_jax.models.decoder import row_sinks, sink_tables
from moe_jax.models.losses import cross_entropy
from moe_jax.models.places import pool_path, stacked_places
from moe_jax.ops.row_gradient import sort_rows, squared_norm
from moe_jax.parallel.rules import batch_sharding, replicated
from moe_jax.routing import ROUTERS
from moe_jax.train.optimizer import learning_rate, make_optimizer
from moe_jax.train.router_state import update_router_state
from moe_jax.train.row_update import row_count, row_gradient, update_rows
from moe_jax.train.state import State, join_tables, split_tables, state_shardings, table_paths

Batch = dict[str, jax.Array]
# Keeps a step's noise apart from the initialisation, which uses the seed's key itself.
NOISE_STREAM = 1


def _split_microbatches(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B/parts, ...]; part a takes rows a, a + parts, ..., so every shard keeps its rows."""
    return jax.tree.map(lambda a: jnp.swapaxes(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 0, 1), batch)


def make_loss(model: nn.Module, config: Config):
    """(dense params, row sinks, tables, router_state, microbatch, tokens, key, step) -> (loss, (nats, losses, stats, ids)).

    `loss` is this microbatch's share of the step's: its nats over the step's `tokens`, plus the weighted router losses over
    the number of microbatches.
    """
    weights = {
        ffn.name: ROUTERS[ffn.moe.router].loss_weights(ffn.moe.options) for ffn in distinct_layers(config.model, "routed")
    }

    def loss(dense, sinks, tables, router_state, micro, tokens, key, step):
        params = join_tables(dense, tables)
        variables = {"params": params, "router_state": router_state} | ({"row_sinks": sinks} if sinks else {})
        out = model.apply(
            variables,
            micro["tokens"],
            micro["positions"],
            micro["segment_ids"],
            key=key,
            train=True,
        )
        nats, _ = cross_entropy(
            out.x,
            out.table,
            micro["targets"],
            micro["loss_weights"],
            chunk=config.model.loss_chunk,
            dtype=jnp.dtype(config.model.dtype),
        )
        total = nats / tokens
        for ffn, losses in out.losses.items():
            for name, value in losses.items():
                if weights[ffn][name]:  # a loss of weight 0 must not leak a NaN
                    total += weights[ffn][name] * value / config.train.microbatches
        return total, (nats, out.losses, out.stats, out.row_ids)

    return loss


def accumulate(model: nn.Module, config: Config, state: State, batch: Batch):
    """Gradients of the whole batch.

    Returns:
      (gradients of the dense parameters, {path: SortedRows} of the tables, loss, nats, losses, stats): losses are means
      and stats are sums over the microbatches.
    """
    parts = config.train.microbatches
    tokens = jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0)
    dense, tables = split_tables(state["params"], table_paths(config))
    noise_seed = config.seed if config.noise_seed < 0 else config.noise_seed
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(noise_seed), NOISE_STREAM), state["step"])
    gradient = jax.value_and_grad(make_loss(model, config), argnums=(0, 1), has_aux=True)

    def one(micro, part):
        sinks = row_sinks(config.model, micro["tokens"].size)
        (loss, (nats, losses, stats, ids)), (d_dense, d_sinks) = gradient(
            dense,
            sinks,
            tables,
            state["router_state"],
            micro,
            tokens,
            jax.random.fold_in(key, part),
            state["step"],
        )
        return (d_dense, loss, nats, losses, stats), (ids, d_sinks)

    micro = _split_microbatches(batch, parts)
    if parts == 1:
        sums, rows = one(jax.tree.map(lambda a: a[0], micro), 0)
        rows = jax.tree.map(lambda a: a[None], rows)
    else:
        first = jax.eval_shape(one, jax.tree.map(lambda a: a[0], micro), 0)[0]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)

        def body(sums, inputs):
            more, rows = one(*inputs)
            return jax.tree.map(jnp.add, sums, more), rows

        sums, rows = jax.lax.scan(body, zeros, (micro, jnp.arange(parts)))
    d_dense, loss, nats, losses, stats = sums
    ids, d_sinks = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in rows)
    table_of, parts_of = sink_tables(config.model), {}
    split = {pool_path(place): place.ffn.peer.split for place in stacked_places(config.model, *RETRIEVING)}
    for path, d in d_sinks.items():
        by_width = "expert" if split.get(table_of[path], config.model.peer.split) == "width" else ""
        one = row_gradient(tables[table_of[path]], ids[path], d, by_width)
        parts_of.setdefault(table_of[path], []).append(one)
    d_rows = {
        path: sort_rows(jax.tree.map(lambda *a: jnp.concatenate(a), *several), row_count(tables[path]))
        for path, several in parts_of.items()
    }
    return d_dense, d_rows, loss, nats / tokens, jax.tree.map(lambda a: a / parts, losses), stats


def losses_by_name(losses: dict[str, dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Router losses by feed-forward layer -> {name: their sum over the layers, the mean over blocks}."""
    names = sorted({name for mine in losses.values() for name in mine})
    return {name: sum(mine[name] for mine in losses.values() if name in mine) for name in names}


def make_train_step(model: nn.Module, config: Config):
    """(state, batch) -> (state, metrics); jit it with the state donated.

    A step whose loss or gradient is not finite leaves params, opt_state, router_state and ema as they were; step and data
    move on, and it is counted.

    metrics: loss (nats per token), total_loss, gradient_norm, learning_rate, skipped, skipped_in_row, losses, stats.
    """
    optimizer, options = make_optimizer(config.optimizer), config.optimizer

    def train_step(state: State, batch: Batch):
        d_dense, d_rows, total, loss, losses, stats = accumulate(model, config, state, batch)
        tables = split_tables(state["params"], table_paths(config))[1]
        squares = sum(squared_norm(rows, row_count(tables[path])) for path, rows in d_rows.items())
        norm = jnp.sqrt(optax.tree.norm(d_dense, squared=True) + squares)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        factor = jnp.minimum(1.0, options.clip_norm / jnp.maximum(norm, 1e-30)) if options.clip_norm else 1.0
        rate = learning_rate(options, config.train, state["step"])

        def apply(old):
            with jax.named_scope("update"):
                dense, tables = split_tables(old["params"], table_paths(config))
                updates, opt_dense = optimizer.update(
                    jax.tree.map(lambda g: factor * g, d_dense), old["opt_state"]["dense"], dense
                )
                dense = jax.tree.map(lambda p, u: p - rate * u, dense, updates)
                opt_rows = {}
                for path, rows in d_rows.items():
                    tables[path], opt_rows[path] = update_rows(
                        options, path, tables[path], old["opt_state"]["rows"][path], rows, rate, factor
                    )
                new = {
                    "params": join_tables(dense, tables),
                    "opt_state": {"dense": opt_dense, "rows": opt_rows},
                }
                applied = state["step"] - state["skipped"] + 1
                new["router_state"] = update_router_state(old["router_state"], stats, new["params"], applied, config.model)
                if "ema" in old:
                    new["ema"] = optax.incremental_update(new["params"], old["ema"], 1 - options.ema_decay)
                return new

        counters = ("step", "skipped", "skipped_in_row")
        old = {name: tree for name, tree in state.items() if name not in counters}
        new = jax.lax.cond(finite, apply, lambda old: old, old)
        skipped = 1 - finite.astype(jnp.int32)
        new["step"] = state["step"] + 1
        new["skipped"] = state["skipped"] + skipped
        new["skipped_in_row"] = (state["skipped_in_row"] + 1) * skipped
        metrics = {
            "loss": loss,
            "total_loss": total,
            "gradient_norm": norm,
            "learning_rate": rate,
            "losses": losses_by_name(losses),
            "stats": stats,
            "skipped": new["skipped"],
            "skipped_in_row": new["skipped_in_row"],
        }
        return new, metrics

    return train_step


def abstract_batch(config: Config, mesh) -> Batch:
    """ShapeDtypeStructs of a global batch, int32 and (`loss_weights`) float32 [B, S], with their sharding."""
    shape = config.data.batch_size, config.data.sequence_length
    sharding = batch_sharding(mesh, config.data.batch_size)
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, dtype in (dtypes | {"loss_weights": jnp.float32}).items()
    }


def compile_train_step(model: nn.Module, config: Config, mesh, state: State, batch: Batch) -> Any:
    """The compiled `make_train_step` on `mesh`; it donates the state.

    Args:
      model: of `config`.
      config: the run's.
      mesh: also of devices that are not there, as for an ahead-of-time compilation.
      state, batch: arrays, or ShapeDtypeStructs (`abstract_state`, `abstract_batch`).
    """
    shardings = state_shardings(model, config, mesh)
    step = jax.jit(
        make_train_step(model, config),
        in_shardings=(shardings, batch_sharding(mesh, config.data.batch_size)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    # XLA may keep bfloat16 values in float32 across what it fuses, and would round differently with scan or remat.
    exact = {"xla_allow_excess_precision": False} if config.model.dtype == "bfloat16" else None
    with jax.set_mesh(mesh):
        return step.lower(state, batch).compile(compiler_options=exact)
