"""Small pools as a dense layer: products of every token with all N experts, of which the R retrieved ones are looked up.

That is N / R times the work of a retrieval, as products of matrices instead of rows fetched one by one. The gates never become
a matrix by themselves: h of the retrieved experts is added into [T, N], a few tokens at a time.
"""

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.precision import batched_product
from moe_jax.ops.retrieval.blocks import Reduce, hidden_gradients, hidden_values, over_tokens
from moe_jax.ops.row_gradient import add_at

# Of one matrix [T, N] of a block of tokens.
BLOCK_BYTES = {"cpu": 2**21, "other": 2**28}


def forward(
    x: jax.Array, ids: jax.Array, gates: jax.Array, table: jax.Array, activation: str | None, reduce: Reduce | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `blocks.forward`."""
    inputs, output = _rows(table, x.dtype)

    def project(x, ids):
        return _of_retrieved(x, ids, inputs)

    def combine(ids, h):
        return _sum(ids, h[..., None], [output], x.shape[1], x.dtype)

    def both(x, ids, gates):
        hidden = project(x, ids)
        return combine(ids, hidden_values(activation, hidden, gates)), hidden

    if reduce is None:
        return _over_tokens(both, table, x, ids, gates)
    hidden = reduce(_over_tokens(project, table, x, ids))
    return _over_tokens(combine, table, ids, hidden_values(activation, hidden, gates)), hidden


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
    """See `blocks.backward`."""
    inputs, output = _rows(table, x.dtype)
    d_y = d_y.astype(x.dtype)

    def project(d_y, ids):
        return _of_retrieved(d_y, ids, [output])

    def combine(ids, d_hidden):
        return _sum(ids, d_hidden, inputs, x.shape[1], x.dtype)

    def both(d_y, ids, gates, hidden):
        d_hidden, d_gates, weights = hidden_gradients(activation, hidden, gates, project(d_y, ids))
        return combine(ids, d_hidden), d_gates, weights

    if reduce is None:
        return _over_tokens(both, table, d_y, ids, gates, hidden)
    d_h = reduce(_over_tokens(project, table, d_y, ids))
    d_hidden, d_gates, weights = hidden_gradients(activation, hidden, gates, d_h)
    return _over_tokens(combine, table, ids, d_hidden), d_gates, weights


def _rows(table, dtype):
    """([N, D] of the input row and the gate row, [N, D] of the output row)."""
    rows = [table[:, m].astype(dtype) for m in range(table.shape[1])]
    return rows[:-1], rows[-1]


def _of_retrieved(x, ids, rows):
    """Products [T, R, m] of each token with those of its experts' rows."""
    products = [jnp.take_along_axis(batched_product("td,nd->tn", x, row), ids, axis=1, mode="clip") for row in rows]
    return jnp.stack(products, axis=-1) if rows else compat.zeros((*ids.shape, 0), x.dtype, like=x)


def _sum(ids, h, rows, width, dtype):
    """[T, R, m] times the rows -> [T, D]."""
    y = compat.zeros((ids.shape[0], width), h.dtype, like=h)
    for m, row in enumerate(rows):
        y = y + batched_product("tn,nd->td", add_at(ids, h[..., m], row.shape[0]).astype(dtype), row)
    return y


def _over_tokens(block, table, *arrays):
    size = compat.for_platform(BLOCK_BYTES) // (table.shape[0] * 4)
    return over_tokens(block, size, *arrays)
