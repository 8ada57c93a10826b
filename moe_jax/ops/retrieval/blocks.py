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

    def project(x, ids):
        return _dot(_fetch(table, ids, x, slice(-1)), x)

    def combine(x, ids, h):
        return _sum(h[..., None], _fetch(table, ids, x, slice(-1, None)))

    def both(x, ids, gates):
        hidden = project(x, ids)
        return combine(x, ids, hidden_values(activation, hidden, gates)), hidden

    if reduce is None:
        return _over_tokens(both, table, x, ids, gates)
    hidden = reduce(_over_tokens(project, table, x, ids))
    return _over_tokens(combine, table, x, ids, hidden_values(activation, hidden, gates)), hidden


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

    def project(d_y, ids):
        return _dot(_fetch(table, ids, d_y, slice(-1, None)), d_y)

    def combine(x, ids, d_hidden):
        return _sum(d_hidden, _fetch(table, ids, x, slice(-1)))

    def both(d_y, x, ids, gates, hidden):
        d_hidden, d_gates, weights = hidden_gradients(activation, hidden, gates, project(d_y, ids))
        return combine(x, ids, d_hidden), d_gates, weights

    d_y = d_y.astype(x.dtype)
    if reduce is None:
        return _over_tokens(both, table, d_y, x, ids, gates, hidden)
    d_hidden, d_gates, weights = hidden_gradients(activation, hidden, gates, reduce(_over_tokens(project, table, d_y, ids)))
    return _over_tokens(combine, table, x, ids, d_hidden), d_gates, weights


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


def _fetch(table, ids, like, which):
    """[T, R, m, D], those of an expert's rows in the slice `which`, in the dtype of `like`."""
    if not range(table.shape[1])[which]:
        return jnp.zeros((*ids.shape, 0, table.shape[2]), like.dtype)
    # A gather of each part that is used: all rows in one would be cut apart again, which copies them.
    return table.at[ids, which].get(mode="clip").astype(like.dtype)


def _dot(rows, x):
    """[T, R, m, D], [T, D] -> [T, R, m]."""
    return batched_product("trmd,td->trm", rows, x)


def _sum(h, rows):
    """[T, R, m], [T, R, m, D] -> [T, D]."""
    return batched_product("trm,trmd->td", h.astype(rows.dtype), rows)


def _over_tokens(block, table, *arrays):
    """`block` of all arrays [T, ...], so many tokens at a time that the rows of a block are about BLOCK_BYTES."""
    (_, m, d), retrieved = table.shape, arrays[-1].shape[1]
    size = compat.for_platform(BLOCK_BYTES) // (retrieved * m * d * arrays[0].dtype.itemsize)
    return over_tokens(block, size, *arrays)


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
