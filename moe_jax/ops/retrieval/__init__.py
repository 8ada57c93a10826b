"""The sum of a few retrieved experts of one neuron each, forward and backward, without the rows of all tokens at once.

A table [N, M, D] holds the M rows of an expert side by side, so that one read fetches them all. With M = 2 these are the input
row u and the output row v, with M = 3 a gate row between them, with M = 1 the output row alone (product-key memory). Token t
with its R retrieved ids has

    y_t = sum_r h_tr v_(id_tr),  h_tr = gates_tr * act(u_(id_tr) . x_t)

(PEER, arXiv:2407.04153, eq. 3 and 4), or h = gates where M = 1. Between the passes live x, ids, gates and pre-activations. The
table's gradient is, for each of its M rows, a sparse matrix times one vector per token. It stays in these factors
(`RowGradient`) until the rows are added up.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.activations import is_gated
from moe_jax.ops.precision import accumulator, standard_promotion
from moe_jax.ops.retrieval import blocks, dense, mosaic, triton
from moe_jax.ops.row_gradient import RowGradient, RowSink, dense_rows


class RetrievalPasses(NamedTuple):
    """`forward` and `backward`, with the signatures of `blocks`; over several devices they have no `reduce`."""

    forward: Callable
    backward: Callable


BACKENDS = {
    "blocks": RetrievalPasses(blocks.forward, blocks.backward),
    "dense": RetrievalPasses(dense.forward, dense.backward),
    "triton": RetrievalPasses(triton.forward, triton.backward),
    "mosaic": RetrievalPasses(mosaic.forward, mosaic.backward),
}
# On a CPU a product with all N experts takes less time than fetching R of them while N is at most so many times R.
DENSE_EXPERTS = 16
_logged: set[str] = set()


def resolve_backend(backend: str | None, width: int, dtype=jnp.float32, experts: int = 0, retrieved: int = 0) -> str:
    """What "auto" or None means for the platform that the program is for (`compat.target_platform`): `triton` on a GPU,
    `mosaic` on a TPU if the width D that a device has is a multiple of 128; else, and for values of 64 bits, `blocks`; on a CPU
    `dense` if a pool is small: of N = `experts`, at most DENSE_EXPERTS times the R = `retrieved` of a token.

    Raises:
      ValueError: the backend is unknown.
    """
    if backend in (None, "auto"):
        on_tpu = "blocks" if width % mosaic.LANES else "mosaic"
        backend = {"tpu": on_tpu, "gpu": "triton", "cuda": "triton"}.get(compat.target_platform(), "blocks")
        if compat.target_platform() == "cpu" and 0 < experts <= DENSE_EXPERTS * retrieved:
            backend = "dense"
        backend = "blocks" if jnp.dtype(dtype).itemsize > 4 else backend
    if backend not in BACKENDS:
        raise ValueError(f"retrieval backend={backend!r}: one of {', '.join(BACKENDS)}, auto")
    if backend not in _logged:
        _logged.add(backend)
        logging.getLogger(__name__).info("retrieval: %s", backend)
    return backend


def rows_of_expert(activation: str | None) -> int:
    """M, how many rows of D values an expert has; `activation` None: the output row alone."""
    return 1 if activation is None else 2 + is_gated(activation)


def retrieve(
    x: jax.Array,
    ids: jax.Array,
    gates: jax.Array,
    table: jax.Array,
    sink: RowSink | None = None,
    *,
    activation: str | None = "gelu",
    passes: RetrievalPasses | None = None,
) -> jax.Array:
    """The gated sum of each token's experts.

    Args:
      x: [T, D].
      ids: int32 [T, R]. Those of several heads stand side by side and may repeat. N or more: no expert.
      gates: [T, R].
      table: [N, M, D].
      sink: zeros, see `row_sink`. If given, the table gets no gradient, and the gradient of the sink is the table's in factors.
      activation: see `moe_jax.ops.activations`; None: the table has values [N, 1, D], and x is not looked at.
      passes: what runs; None: those of `resolve_backend`, or of `blocks` under a mesh of several devices, over which only
        `moe_jax.dispatch.retrieval` can split a kernel.

    Returns:
      [T, D] in the dtype of x; sums are in float32 at least.

    Raises:
      ValueError: the table's shape does not fit; what the kernel of a backend cannot do.
    """
    rows = rows_of_expert(activation)
    if table.shape[1:] != (rows, x.shape[-1]):
        raise ValueError(f"table {table.shape}: activation={activation!r} needs [N, {rows}, {x.shape[-1]}]")
    if not x.shape[0]:
        return x
    here = ids < table.shape[0]
    # A token without an expert has gates of 0 alone, and 0 * NaN would be NaN.
    x = jnp.where(jnp.any(here, axis=-1, keepdims=True), x, 0)
    gates = jnp.where(here, gates, 0).astype(accumulator(x.dtype))
    axes = compat.varying_axes(x, ids, gates, table)
    args = jax.tree.map(lambda a: compat.vary(a, axes), (x, ids, gates, table))
    if passes is None:
        mesh = compat.current_mesh()
        plain = axes or mesh is not None and mesh.size > 1  # a checked shard_map refuses kernels too
        sizes = x.shape[-1], jnp.result_type(x, table), table.shape[0], ids.shape[1]
        passes = BACKENDS["blocks" if plain else resolve_backend(None, *sizes)]
    return _retrieve(*args, sink, activation, passes)


def row_sink(tokens: int, retrieved: int, rows: int, width: int, dtype=jnp.float32) -> RowSink:
    """Zeros in the shape of the factors of a table's gradient: weights [T, R, M], vectors [T, M, D]."""
    return RowSink(jnp.zeros((tokens, retrieved, rows), dtype), jnp.zeros((tokens, rows, width), dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _retrieve(x, ids, gates, table, sink, activation, passes):
    return passes.forward(x, ids, gates, table, activation)[0].astype(x.dtype)


def _vjp_forward(x, ids, gates, table, sink, activation, passes):
    y, hidden = passes.forward(x, ids, gates, table, activation)
    of_sink = None if sink is None else jax.tree.map(lambda a: jnp.zeros((), a.dtype), sink)  # its dtypes
    return y.astype(x.dtype), (x, ids, gates, table, hidden, of_sink)


@standard_promotion()
def _vjp_backward(activation, passes, residuals, d_y):
    x, ids, gates, table, hidden, sink = residuals
    d_x, d_gates, weights = passes.backward(d_y, x, ids, gates, hidden, table, activation)
    d_x = d_x.astype(x.dtype)
    vectors = jnp.stack([x] * (table.shape[1] - 1) + [d_y.astype(x.dtype)], axis=1).astype(weights.dtype)
    if sink is None:
        return d_x, None, d_gates, dense_rows(RowGradient(ids, weights, vectors), table.shape[0]).astype(table.dtype), None
    return d_x, None, d_gates, None, RowSink(weights.astype(sink.weights.dtype), vectors.astype(sink.vectors.dtype))


_retrieve.defvjp(_vjp_forward, _vjp_backward)
