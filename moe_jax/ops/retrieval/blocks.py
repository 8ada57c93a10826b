"""Retrieved rows a few tokens at a time, in plain JAX: a block of rows is fetched and used while it is in the cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.activations import activate
from moe_jax.ops.precision import batched_product

# Of retrieved rows that lie in memory at once.
BLOCK_BYTES = {"cpu": 2**20, "other": 2**27}
Reduce = Callable[[jax.Array], jax.Array]


def forward(
    x: jax.Array, ids: jax.Array, gates: jax.Array, table: jax.Array, activation: str | None, reduce: Reduce | None = None
) -> tuple[jax.Array, jax.Array]:
    """(y [T, D], pre-activations [T, R, M-1]), both in the dtype of the gates; see `retrieve`.

    reduce: of shards that have a part of D each: adds [T, R, M-1] up over them.
    """

    project, combine = _products(table, x.dtype, slice(-1)), _sums(table, x.dtype, slice(-1, None))
    return run_forward(project, combine, _tokens(table, ids, x.dtype), x, ids, gates, activation, reduce)


def backward(
    d_y: jax.Array,
    x: jax.Array,
    ids: jax.Array,
    gates: jax.Array,
    hidden: jax.Array,
    table: jax.Array,
    activation: str | None,
    reduce: Reduce | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(d_x [T, D], d_gates [T, R], the weights [T, R, M] of the table's gradient), in the dtype of the gates; see `retrieve`.

    The vectors that belong to the weights are x, M-1 times, and d_y. reduce: as in `forward`, of [T, R, 1].
    """

    project, combine = _products(table, x.dtype, slice(-1, None)), _sums(table, x.dtype, slice(-1))
    size = _tokens(table, ids, x.dtype)
    return run_backward(project, combine, size, d_y.astype(x.dtype), ids, gates, hidden, activation, reduce)


def run_forward(project: Callable, combine: Callable, size: int, x, ids, gates, activation, reduce):
    """`forward` by any way to use rows, `size` tokens at a time.

    project: (x [T, D], ids) -> its products [T, R, M-1] with the input rows. combine: (ids, weights [T, R, 1]) -> [T, D], the
      sum of the output rows.
    """

    def both(x, ids, gates):
        hidden = project(x, ids)
        return combine(ids, hidden_values(activation, hidden, gates)[..., None]), hidden

    if reduce is None:
        return over_tokens(both, size, x, ids, gates)
    hidden = reduce(over_tokens(project, size, x, ids))
    return over_tokens(combine, size, ids, hidden_values(activation, hidden, gates)[..., None]), hidden


def run_backward(project: Callable, combine: Callable, size: int, d_y, ids, gates, hidden, activation, reduce):
    """`backward` in the same manner: `project` is by the output rows, [T, R, 1], and `combine` sums the input rows."""

    def both(d_y, ids, gates, hidden):
        d_hidden, d_gates, weights = hidden_gradients(activation, hidden, gates, project(d_y, ids))
        return combine(ids, d_hidden), d_gates, weights

    if reduce is None:
        return over_tokens(both, size, d_y, ids, gates, hidden)
    d_h = reduce(over_tokens(project, size, d_y, ids))
    d_hidden, d_gates, weights = hidden_gradients(activation, hidden, gates, d_h)
    return over_tokens(combine, size, ids, d_hidden), d_gates, weights


def hidden_values(activation: str | None, hidden: jax.Array, gates: jax.Array) -> jax.Array:
    """h [T, R], what each retrieved output row is multiplied by, from the pre-activations [T, R, M-1]."""
    if activation is None:
        return gates
    gate = hidden[..., 1] if hidden.shape[-1] > 1 else None
    return gates * activate(activation, hidden[..., 0], gate)


def hidden_gradients(
    activation: str | None, hidden: jax.Array, gates: jax.Array, d_h: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(d_hidden [T, R, M-1], d_gates [T, R], weights [T, R, M] of the table's gradient) from that of h, [T, R, 1]."""
    h, vjp = jax.vjp(lambda hidden, gates: hidden_values(activation, hidden, gates), hidden, gates)
    d_hidden, d_gates = vjp(d_h[..., 0])
    return d_hidden, d_gates, jnp.concatenate([d_hidden, h[..., None]], axis=-1)


def _fetch(table, ids, dtype, which):
    """[T, R, m, D], those of an expert's rows in the slice `which`."""
    if not range(table.shape[1])[which]:
        return jnp.zeros((*ids.shape, 0, table.shape[2]), dtype)
    # A gather of each part that is used: all rows in one would be cut apart again, which copies them.
    return table.at[ids, which].get(mode="clip").astype(dtype)


def _products(table, dtype, which):
    """(x [T, D], ids) -> [T, R, m]."""
    return lambda x, ids: batched_product("trmd,td->trm", _fetch(table, ids, dtype, which), x)


def _sums(table, dtype, which):
    """(ids, h [T, R, m]) -> [T, D]."""
    return lambda ids, h: batched_product("trm,trmd->td", h.astype(dtype), _fetch(table, ids, dtype, which))


def _tokens(table, ids, dtype):
    """So many that the rows of a block are about BLOCK_BYTES."""
    (_, m, d), retrieved = table.shape, ids.shape[1]
    return compat.for_platform(BLOCK_BYTES) // (retrieved * m * d * dtype.itemsize)


def over_tokens(block: Callable, size: int, *arrays: jax.Array):
    """`block` of all arrays [T, ...], `size` tokens at a time, one at least."""
    tokens, size = arrays[0].shape[0], max(size, 1)
    if size >= tokens:
        return block(*arrays)
    blocks = -(-tokens // size)

    def split(array):
        fill = [(0, blocks * size - tokens)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, fill).reshape(blocks, size, *array.shape[1:])

    outputs = jax.lax.map(lambda part: block(*part), tuple(split(array) for array in arrays))
    return jax.tree.map(lambda a: a.reshape(blocks * size, *a.shape[2:])[:tokens], outputs)
