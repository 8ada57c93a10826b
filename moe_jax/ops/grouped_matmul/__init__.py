"""Grouped matrix product: consecutive groups of rows, each times its own matrix. One file per backend."""

import logging

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.grouped_matmul import blocks, loop, ragged_dot

BACKENDS = {
    "blocks": blocks.grouped_matmul,
    "ragged_dot": ragged_dot.grouped_matmul,
    "loop": loop.grouped_matmul,
}
_logged: set[str] = set()


def resolve_backend(backend: str | None = None) -> str:
    """What "auto" or None means here: `blocks` on a CPU, `ragged_dot` (a grouped kernel) elsewhere."""
    if backend in (None, "auto"):
        backend = "blocks" if compat.target_platform() == "cpu" else "ragged_dot"
    if backend not in BACKENDS:
        raise ValueError(f"grouped_matmul backend={backend!r}: one of {', '.join(BACKENDS)}, auto")
    if backend not in _logged:
        _logged.add(backend)
        logging.getLogger(__name__).info("grouped_matmul: %s", backend)
    return backend


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    preferred_element_type=None,
    backend: str | None = None,
) -> jax.Array:
    """Rows of group e times `rhs[e]`.

    Args:
      lhs: [M, D], rows sorted by group.
      rhs: [E, D, F].
      group_sizes: integer [E] with a sum of at most M.
      preferred_element_type: dtype of the result; None: the operands' promoted dtype.
      backend: "blocks", "ragged_dot", "loop" (the reference), or None for the platform's best.

    Returns:
      [M, F]. Rows past sum(group_sizes) are exactly 0, as is their gradient, whatever `lhs` holds there.
      Products accumulate in float32 at least.

    Raises:
      ValueError: shapes that do not fit, an unknown backend, group sizes that are not integers.
    """
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1] or group_sizes.shape != rhs.shape[:1]:
        raise ValueError(
            "grouped_matmul wants lhs [M, D], rhs [E, D, F], group_sizes [E]; "
            f"got {lhs.shape}, {rhs.shape}, {group_sizes.shape}"
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul wants integer group_sizes; got {group_sizes.dtype}")
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    lhs, rhs, group_sizes = compat.vary_alike(lhs.astype(dtype), rhs.astype(dtype), group_sizes)
    out_dtype = jnp.dtype(preferred_element_type or dtype)
    return BACKENDS[resolve_backend(backend)](lhs, rhs, group_sizes, out_dtype)
