"""Row-wise updates of tables: only the rows with a gradient are read and written."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.config import OptimizerConfig
from moe_jax.ops.row_gradient import RowGradient, RowSink, SortedRows, WholeRows, fold_rows
from moe_jax.train.optimizer import epsilon, group_settings


class RowAdamState(NamedTuple):
    """Adam's moments, of a table's shape, and how often each row was updated, int32 [N]."""

    mu: jax.Array
    nu: jax.Array
    count: jax.Array


class RowAdagradState(NamedTuple):
    """The sum of each row's mean squares so far, float32 [N]."""

    accumulator: jax.Array


RowState = RowAdamState | RowAdagradState


def init_rows(config: OptimizerConfig, table: jax.Array) -> RowState:
    """The state before the first update of a table [V, D], or a pool [N, M, D] or [G, N, M, D]."""
    rows = _rows_shape(table)
    if config.row_optimizer == "adagrad":
        return RowAdagradState(jnp.zeros(rows, jnp.float32))
    return RowAdamState(jnp.zeros_like(table), jnp.zeros_like(table), jnp.zeros(rows, jnp.int32))


def state_like(config: OptimizerConfig, of_table: Any, of_rows: Any) -> RowState:
    """The state's structure with `of_table` in place of what has the table's shape, `of_rows` of what is [N]."""
    if config.row_optimizer == "adagrad":
        return RowAdagradState(of_rows)
    return RowAdamState(of_table, of_table, of_rows)


def row_gradient(table: jax.Array, ids: jax.Array, d_sink: RowSink | jax.Array, width_axis: str = "") -> RowGradient:
    """The gradient of the table seen as [N, M, D], as `flat` sees it.

    Args:
      table: [V, D], [N, M, D] or, stacked over groups, [G, N, M, D].
      ids: int32, as of `Output.row_ids`, with an axis of microbatches before the others; of a pool [N, M, D] also with one of
        groups that share it.
      d_sink: the gradient of its sink, with the same axis.
      width_axis: the mesh axis that splits the D of pools, if one does.
    """
    if isinstance(d_sink, jax.Array):  # a lookup
        vectors = d_sink.reshape(-1, 1, d_sink.shape[-1])
        return RowGradient(ids.reshape(-1, 1), jnp.ones((vectors.shape[0], 1, 1), vectors.dtype), vectors)
    weights, vectors = d_sink
    if table.ndim == 4:
        groups, rows = table.shape[:2]
        own = ids + rows * jnp.arange(groups, dtype=ids.dtype)[:, None, None]
        ids = jnp.where(ids < rows, own, groups * rows)
    gradient = RowGradient(*(a.reshape(-1, *a.shape[-k:]) for a, k in ((ids, 1), (weights, 2), (vectors, 2))))
    # The merge sorts all ids: the factors are small, so that every device gets them once instead of a part for each block.
    return RowGradient(
        compat.constrain(gradient.ids, (), ()),
        compat.constrain(gradient.weights, (), (), ()),
        compat.constrain(gradient.vectors, (), (), (width_axis,) if width_axis else ()),
    )


def row_count(table: jax.Array) -> int:
    """N of `flat(table)`."""
    return flat(table).shape[0]


def flat(table: jax.Array) -> jax.Array:
    """[V, D] -> [V, 1, D]; [G, N, M, D] -> [G N, M, D]."""
    return table[:, None] if table.ndim == 2 else table.reshape(-1, *table.shape[-2:])


def update_rows(
    config: OptimizerConfig,
    path: str,
    table: jax.Array,
    state: RowState,
    rows: SortedRows | WholeRows,
    rate: jax.Array,
    factor: jax.Array | float = 1.0,
) -> tuple[jax.Array, RowState]:
    """The update of the rows that have a gradient; all others and their state stay untouched.

    Adam corrects the bias by each row's own updates, so that a row's first update is Adam's first update. Adagrad (Duchi et al.
    2011) has one accumulator for a row, the sum of its gradients' mean squares, which saves the moments. Weight
    decay is that of the parameter group, on the touched rows.

    Args:
      config: `row_optimizer`, and Adam's constants.
      path: of the table, for its parameter group.
      table, state: from `init_rows`.
      rows: the gradient, from `join_rows(row_gradient(...), row_count(table))`.
      rate: the step's learning rate.
      factor: multiplies the gradient.

    Returns:
      (table, state).
    """
    scale, decay = group_settings(config, path)
    decay = max(decay, 0.0)  # a table's rows are looked up, not multiplied: they have none unless their group asks for it
    direction = _adagrad if config.row_optimizer == "adagrad" else _adam

    def move(carry, sums, at, put):
        table, state = carry
        old = at(table)
        update, state = direction(config, state, factor * sums, at, put)
        return put(table, old - rate * scale * (update + decay * old if decay else update)), state

    def step(carry, ids, sums):
        at = lambda array: array.at[ids].get(mode="clip")  # what ids past the table get is not written
        put = lambda array, value: array.at[ids].set(value.astype(array.dtype), mode="drop", unique_indices=True)
        return move(carry, sums, at, put)

    shaped = jax.tree.map(lambda a: flat(a) if a.shape == table.shape else a.reshape(-1), state)
    if isinstance(rows, WholeRows):
        of_row = lambda array: rows.touched.reshape(-1, *[1] * (array.ndim - 1))
        put = lambda array, value: jnp.where(of_row(array), value.astype(array.dtype), array)
        new, shaped = move((flat(table), shaped), rows.rows, lambda array: array, put)
    else:
        new, shaped = fold_rows(step, (flat(table), shaped), rows)
    return new.reshape(table.shape), jax.tree.map(lambda a, old: a.reshape(old.shape), shaped, state)


def _adam(config, state, g, at, put):
    n = at(state.count) + 1
    mu = config.b1 * at(state.mu) + (1 - config.b1) * g
    nu = config.b2 * at(state.nu) + (1 - config.b2) * g * g
    correction = lambda decay: (1 - decay**n)[:, None, None]
    update = (mu / correction(config.b1)) / (jnp.sqrt(nu / correction(config.b2)) + epsilon(config))
    return update, RowAdamState(put(state.mu, mu), put(state.nu, nu), put(state.count, n))


def _adagrad(config, state, g, at, put):
    total = at(state.accumulator) + jnp.mean(jnp.square(g), axis=(1, 2))
    return g / (jnp.sqrt(total)[:, None, None] + epsilon(config)), RowAdagradState(put(state.accumulator, total))


def _rows_shape(table):
    return table.shape[:-1] if table.ndim == 2 else table.shape[:-2]
