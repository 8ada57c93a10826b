"""AdamW with a schedule, parameter groups by path, and row-wise updates of tables.

The schedule follows the run's step, not a counter of applied updates: a skipped step still moves it on.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import ConfigError, OptimizerConfig, TrainConfig


def learning_rate(config: OptimizerConfig, train: TrainConfig, step: jax.Array) -> jax.Array:
    """The learning rate of optimizer step `step`, counted from 0: linear warm-up, then the schedule to the last step."""
    warmup, end = config.warmup_steps, config.learning_rate * config.final_fraction
    rest = max(train.steps - warmup, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest, alpha=config.final_fraction),
        "linear": optax.linear_schedule(config.learning_rate, end, rest),
        "constant": optax.constant_schedule(config.learning_rate),
    }[config.schedule]
    # Step 0 already learns: the warm-up counts from 1.
    return jnp.where(step < warmup, config.learning_rate * (step + 1) / max(warmup, 1), decay(step - warmup))


def leaf_paths(tree: Any) -> Any:
    """The 'a/b/c' path of every leaf, in the tree's structure."""
    return jax.tree_util.tree_map_with_path(
        lambda p, _: jax.tree_util.keystr(p, simple=True, separator="/"), tree
    )


def _group(config: OptimizerConfig, path: str):
    return next((group for group in config.groups if re.search(group.path, path)), None)


def group_factors(config: OptimizerConfig, params: Any) -> tuple[Any, Any]:
    """Learning-rate scale and weight decay of every parameter, as Python floats in the structure of `params`.

    Weight decay is for matrices only. Stacked layers add a leading axis, so a "vector" is known by its name: norms'
    scales and biases (`scale`, `bias`, `b_*`).
    """

    def scale(path):
        group = _group(config, path)
        return 1.0 if group is None else group.learning_rate_scale

    def decay(path):
        group, name = _group(config, path), path.rsplit("/", 1)[-1]
        if group is not None and group.weight_decay >= 0:
            return group.weight_decay
        return 0.0 if name in ("scale", "bias") or name.startswith("b_") else config.weight_decay

    paths = leaf_paths(params)
    return jax.tree.map(scale, paths), jax.tree.map(decay, paths)


def check_groups(config: OptimizerConfig, params: Any) -> None:
    """Refuses a group that is the first match of no parameter: it would be without effect.

    Raises:
      ConfigError: naming the group.
    """
    paths = jax.tree.leaves(leaf_paths(params))
    used = [_group(config, path) for path in paths]
    for i, group in enumerate(config.groups):
        if not any(group is one for one in used):
            limit, fix = (
                "matches no parameter",
                f"their paths are such as {', '.join(paths[:: len(paths) // 4 + 1])}",
            )
            if any(re.search(group.path, path) for path in paths):
                limit, fix = "all that it matches is in a group before it", "move it up"
            raise ConfigError(f"optimizer.groups[{i}].path", group.path, limit, fix)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam directions plus decayed weights, scaled per group; the caller multiplies by the learning rate."""

    def decay_and_scale(updates, params):
        scales, decays = group_factors(config, params)
        return jax.tree.map(lambda u, p, s, d: s * (u + d * p), updates, params, scales, decays)

    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.epsilon),
        optax.stateless(decay_and_scale),
    )


class Rows(NamedTuple):
    """A gradient of a table [N, D] by rows: ids int32 [R], N or more for "no row"; rows [R, D]. After `merge_rows` ids are unique."""

    ids: jax.Array
    rows: jax.Array


class RowAdamState(NamedTuple):
    """Adam's moments [N, D] of a table and how often each row was updated, int32 [N]."""

    mu: jax.Array
    nu: jax.Array
    count: jax.Array


def merge_rows(gradient: Rows, table_rows: int) -> Rows:
    """Adds up the rows of equal ids: ids become unique and ascending, the freed places lie past N."""
    order = jnp.argsort(gradient.ids)
    ids, rows = gradient.ids[order], gradient.rows[order]
    first = jnp.concatenate([jnp.ones((1,), bool), ids[1:] != ids[:-1]])
    segment = jnp.cumsum(first) - 1
    summed = jax.ops.segment_sum(rows, segment, num_segments=ids.shape[0], indices_are_sorted=True)
    # Unused places get ids past the table, all different, or a scatter's promise of unique indices would be false.
    unique = (
        (table_rows + jnp.arange(ids.shape[0], dtype=ids.dtype)).at[segment].min(ids, indices_are_sorted=True)
    )
    return Rows(unique, jnp.where((unique < table_rows)[:, None], summed, 0))


def init_row_adam(table: jax.Array) -> RowAdamState:
    """Zero moments for a table [N, D]."""
    return RowAdamState(jnp.zeros_like(table), jnp.zeros_like(table), jnp.zeros(table.shape[:1], jnp.int32))


def update_rows(
    config: OptimizerConfig, path: str, table: jax.Array, state: RowAdamState, gradient: Rows, rate: jax.Array
) -> tuple[jax.Array, RowAdamState]:
    """Adam on the rows that `gradient` (merged) names; all other rows and their moments stay untouched.

    Bias correction counts each row's own updates, so the first update of a row equals Adam's first update. Weight decay of the
    parameter group applies to the touched rows.
    """
    ids, g = gradient
    count = state.count.at[ids].add(1, mode="drop", unique_indices=True)

    def at(array):
        return array.at[ids].get(mode="fill", fill_value=0, unique_indices=True)

    def put(array, value):
        return array.at[ids].set(value.astype(array.dtype), mode="drop", unique_indices=True)

    mu = config.b1 * at(state.mu) + (1 - config.b1) * g
    nu = config.b2 * at(state.nu) + (1 - config.b2) * g * g
    n = jnp.maximum(at(count), 1)[:, None]
    direction = (mu / (1 - config.b1**n)) / (jnp.sqrt(nu / (1 - config.b2**n)) + config.epsilon)
    group = _group(config, path)
    # A table's rows are looked up, not multiplied: they have no weight decay unless their group asks for it.
    decay = max(group.weight_decay, 0.0) if group else 0.0
    scale = group.learning_rate_scale if group else 1.0
    new = at(table) - rate * scale * (direction + decay * at(table))
    return put(table, new), RowAdamState(put(state.mu, mu), put(state.nu, nu), count)
