"""One optimizer step: gradients over microbatches, clipping, the update, and the routers' own learning."""

from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from moe_jax.config import Config
from moe_jax.config.blocks import RETRIEVING, distinct_layers
from moe_jax.models.decoder import row_sinks, sink_tables
from moe_jax.models.losses import cross_entropy
from moe_jax.models.places import deciding_places, pool_path, stacked_places
from moe_jax.ops.row_gradient import SortedRows, WholeRows, join_rows, squared_norm
from moe_jax.parallel.rules import batch_sharding, replicated
from moe_jax.routing import ROUTERS
from moe_jax.train.frozen import frozen_by_routers, frozen_count, keep_frozen, keep_frozen_moments
from moe_jax.train.optimizer import learning_rate, make_optimizer
from moe_jax.train.router_state import update_router_state
from moe_jax.train.row_update import row_count, row_gradient, update_rows
from moe_jax.train.state import State, learned_params, overlay, split_params, state_shardings

Batch = dict[str, jax.Array]
# Keeps a step's noise apart from the initialisation, which uses the seed's key itself.
NOISE_STREAM = 1
# Parts of the state that a step moves on even where it changes nothing else.
COUNTERS = ("step", "skipped", "skipped_in_row")


def _split_microbatches(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B/parts, ...]; part a takes rows a, a + parts, ..., so every shard keeps its rows."""
    return jax.tree.map(lambda a: jnp.swapaxes(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 0, 1), batch)


class Gradients(NamedTuple):
    """Of a whole batch. dense: a tree, of the parameters with dense gradients. rows: {path: rows} of the tables."""

    dense: Any
    rows: dict[str, SortedRows | WholeRows]


class Totals(NamedTuple):
    """Losses and statistics of a batch. total_loss: what is differentiated. loss: nats per token. losses: the
    routers', unweighted, by feed-forward layer, as means over the microbatches. stats: the routers', summed over them.
    rows: with a curriculum how many experts the tokens of each row took, {name of a block: [B]}."""

    total_loss: jax.Array
    loss: jax.Array
    losses: dict[str, dict[str, jax.Array]]
    stats: Any
    rows: dict[str, jax.Array]


def make_loss(model: nn.Module, config: Config):
    """(learned, state, microbatch, tokens, key) -> (loss, (nats, losses, stats, row ids, rows)).

    learned: {"params", "row_sinks"}, what is differentiated; its leaves replace those of `state` and the zeros of the sinks.
    loss: this microbatch's share of the step's: its nats over the step's `tokens`, plus the weighted router losses over the
    number of microbatches.
    """
    weights = {
        ffn.name: ROUTERS[ffn.moe.router].loss_weights(ffn.moe.options) for ffn in distinct_layers(config.model, "routed")
    }

    def loss(learned, state, micro, tokens, key):
        variables = {
            "params": overlay(state["params"], learned["params"]),
            "router_state": state["router_state"],
            "row_sinks": overlay(row_sinks(config.model, micro["tokens"].size), learned["row_sinks"]),
        }
        out = model.apply(variables, micro["tokens"], micro["positions"], micro["segment_ids"], key=key, train=True)
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
        rows = {}
        if config.data.curriculum != "none":
            names = [place.name for place in deciding_places(config.model)]
            rows = {name: out.rows[name]["experts"] for name in names if name in out.rows}
        return total, (nats, out.losses, out.stats, out.row_ids, rows)

    return loss


def accumulate(model: nn.Module, config: Config, state: State, batch: Batch) -> tuple[Gradients, Totals]:
    """Gradients of the whole batch, added up over its microbatches."""
    parts = config.train.microbatches
    tokens = jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0)
    noise_seed = config.seed if config.noise_seed < 0 else config.noise_seed
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(noise_seed), NOISE_STREAM), state["step"])
    dense, tables = split_params(config, state["params"])
    gradient = jax.value_and_grad(make_loss(model, config), has_aux=True)

    def add_up(micro, part):
        """(what is summed over the microbatches, what is kept of each)."""
        learned = {"params": dense, "row_sinks": _learned_sinks(config, tables, micro["tokens"].size)}
        (loss, (nats, *aux, ids, by_row)), d = gradient(learned, state, micro, tokens, jax.random.fold_in(key, part))
        return (d["params"], loss, nats, *aux), (ids, d["row_sinks"], by_row)

    micro = _split_microbatches(batch, parts)
    if parts == 1:
        sums, rows = add_up(jax.tree.map(lambda a: a[0], micro), 0)
        rows = jax.tree.map(lambda a: a[None], rows)
    else:
        shapes = jax.eval_shape(add_up, jax.tree.map(lambda a: a[0], micro), 0)[0]

        def body(sums, inputs):
            more, rows = add_up(*inputs)
            return jax.tree.map(jnp.add, sums, more), rows

        sums, rows = jax.lax.scan(body, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), (micro, jnp.arange(parts)))
    d_dense, total_loss, nats, losses, stats = sums
    *rows, by_row = rows
    by_row = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).reshape(-1), by_row)  # as `_split_microbatches` took them apart
    totals = Totals(total_loss, nats / tokens, jax.tree.map(lambda a: a / parts, losses), stats, by_row)
    return Gradients(d_dense, _row_gradients(config, tables, *rows)), totals


def _learned_sinks(config: Config, tables: dict[str, jax.Array], tokens: int) -> dict[str, Any]:
    """The row sinks of the tables that learn."""
    sinks, table_of = flax.traverse_util.flatten_dict(row_sinks(config.model, tokens), sep="/"), sink_tables(config.model)
    return flax.traverse_util.unflatten_dict({p: s for p, s in sinks.items() if table_of[p] in tables}, sep="/")


def _row_gradients(config: Config, tables: dict[str, jax.Array], ids: Any, d_sinks: Any) -> dict[str, SortedRows | WholeRows]:
    """{path of a table: its gradient}, from the row ids and gradients of all sinks, with an axis of microbatches."""
    ids, d_sinks = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (ids, d_sinks))
    table_of, of_table = sink_tables(config.model), {}
    split = {pool_path(place): place.ffn.peer.split for place in stacked_places(config.model, *RETRIEVING)}
    for sink, d_sink in d_sinks.items():
        table = table_of[sink]
        by_width = "expert" if split.get(table, config.model.peer.split) == "width" else ""
        of_table.setdefault(table, []).append(row_gradient(tables[table], ids[sink], d_sink, by_width))
    joined = {path: jax.tree.map(lambda *a: jnp.concatenate(a), *several) for path, several in of_table.items()}
    return {path: join_rows(rows, row_count(tables[path])) for path, rows in joined.items()}


def gradient_norm(gradients: Gradients, tables: dict[str, jax.Array]) -> jax.Array:
    """The global norm over all parameters, scalar."""
    squares = sum(squared_norm(rows, row_count(tables[path])) for path, rows in gradients.rows.items())
    return jnp.sqrt(optax.tree.norm(gradients.dense, squared=True) + squares)


def make_update(config: Config):
    """(old, gradients, frozen, factor, stats, rate, applied) -> new: the state without its counters, updated once.

    frozen: from `frozen_by_routers`. factor: what clipping multiplies the gradients by. stats: the routers', summed over the
    batch. rate: the learning rate. applied: the number of updates so far, this one included.
    """
    optimizer, options = make_optimizer(config.optimizer), config.optimizer

    def update(old: State, gradients: Gradients, frozen, factor, stats, rate, applied) -> State:
        before, tables = split_params(config, old["params"])
        clipped = jax.tree.map(lambda g: factor * g, gradients.dense)
        updates, opt_dense = optimizer.update(clipped, old["opt_state"]["dense"], before)
        opt_dense = keep_frozen_moments(frozen, old["opt_state"]["dense"], opt_dense)
        dense = keep_frozen(frozen, before, jax.tree.map(lambda p, u: p - rate * u, before, updates))
        opt_rows = {}
        for path, rows in gradients.rows.items():
            moments = old["opt_state"]["rows"][path]
            tables[path], opt_rows[path] = update_rows(options, path, tables[path], moments, rows, rate, factor)
        new = {
            "params": overlay(old["params"], dense, tables),
            "opt_state": {"dense": opt_dense, "rows": opt_rows},
        }
        new["router_state"] = update_router_state(old["router_state"], stats, new["params"], applied, config)
        if "ema" in old:
            learned = learned_params(config, new["params"])
            averaged = optax.incremental_update(learned, old["ema"], 1 - options.ema_decay)
            new["ema"] = keep_frozen(frozen, learned, averaged)  # evaluation uses a frozen leaf as it is
        return new

    return update


def losses_by_name(losses: dict[str, dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Router losses by feed-forward layer -> {name: their sum over the layers, the mean over blocks}."""
    names = sorted({name for layer_losses in losses.values() for name in layer_losses})
    return {name: sum(layer_losses[name] for layer_losses in losses.values() if name in layer_losses) for name in names}


def make_train_step(model: nn.Module, config: Config):
    """(state, batch) -> (state, metrics); jit it with the state donated.

    Frozen parameters (`train.frozen`) keep their bits. A step whose loss or gradient is not finite is counted and
    skipped: it leaves params, opt_state, router_state and ema as they were, while step and data move on.

    metrics: loss (nats per token), total_loss, gradient_norm, learning_rate, skipped, skipped_in_row, losses, stats, rows;
    frozen, how many leaves routers kept frozen in the step.
    """
    update, clip_norm = make_update(config), config.optimizer.clip_norm

    def train_step(state: State, batch: Batch):
        gradients, totals = accumulate(model, config, state, batch)
        frozen = frozen_by_routers(config.model, state["router_state"], state["params"])
        zeros = jax.tree.map(jnp.zeros_like, gradients.dense)
        gradients = gradients._replace(dense=keep_frozen(frozen, zeros, gradients.dense))
        norm = gradient_norm(gradients, split_params(config, state["params"])[1])
        factor = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30)) if clip_norm else 1.0
        rate = learning_rate(config.optimizer, config.train, state["step"])
        applied = state["step"] - state["skipped"] + 1

        def apply(old):
            with jax.named_scope("update"):
                return update(old, gradients, frozen, factor, totals.stats, rate, applied)

        finite = jnp.isfinite(totals.total_loss) & jnp.isfinite(norm)
        learning = {name: tree for name, tree in state.items() if name not in COUNTERS}
        learning = jax.lax.cond(finite, apply, lambda old: old, learning)
        skipped = 1 - finite.astype(jnp.int32)
        counters = {
            "step": state["step"] + 1,
            "skipped": state["skipped"] + skipped,
            "skipped_in_row": (state["skipped_in_row"] + 1) * skipped,
        }
        metrics = totals._asdict() | {"losses": losses_by_name(totals.losses), "gradient_norm": norm, "learning_rate": rate}
        metrics["frozen"] = frozen_count(frozen)
        return learning | counters, metrics | {name: counters[name] for name in ("skipped", "skipped_in_row")}

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
