"""Small pools as a dense layer: products of every token with all N experts, of which the R retrieved ones are looked up.

That is N / R times the work of a retrieval, as products of matrices instead of rows fetched one by one. The gates never become
a matrix by themselves: h of the retrieved experts is added into [T, N], a few tokens at a time.
"""

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.precision import batched_product
from moe_jax.ops.retrieval.blocks import Reduce, run_backward, run_forward
from moe_jax.ops.row_gradient import add_at

# Of one matrix [T, N] of a block of tokens.
BLOCK_BYTES = {"cpu": 2**21, "other": 2**28}


def forward(
    x: jax.Array, ids: jax.Array, gates: jax.Array, table: jax.Array, activation: str | None, reduce: Reduce | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `blocks.forward`."""
    inputs, output = _rows(table, x.dtype)
    project = lambda x, ids: _of_retrieved(x, ids, inputs)
    combine = lambda ids, h: _sum(ids, h, [output], x.shape[1], x.dtype)
    return run_forward(project, combine, _tokens(table), x, ids, gates, activation, reduce)


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
    project = lambda d_y, ids: _of_retrieved(d_y, ids, [output])
    combine = lambda ids, d_hidden: _sum(ids, d_hidden, inputs, x.shape[1], x.dtype)
    return run_backward(project, combine, _tokens(table), d_y.astype(x.dtype), ids, gates, hidden, activation, reduce)


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


def _tokens(table):
    """So many that a matrix [T, N] is about BLOCK_BYTES."""
    return compat.for_platform(BLOCK_BYTES) // (table.shape[0] * 4)
