"""Grouped matrix product: consecutive groups of rows, each times its own matrix. One file per backend."""

import functools
import logging
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.grouped_matmul import blocks, loop, megablox, ragged_dot, tokamax


class Backend(NamedTuple):
    """rows_times_groups(lhs [M, D], rhs [E, D, F], group_sizes, out_dtype, transposed=False) -> [M, F], or with `transposed`
    lhs [M, F] -> [M, D]; group_products(lhs [M, D], d_out [M, F], group_sizes, out_dtype) -> [E, D, F], a product for each
    group. Both accumulate in float32 at least, never let a row reach another group's result, and give 0 for the tail.
    typed: whether shard_map can check what they return.
    """

    rows_times_groups: Callable[..., jax.Array]
    group_products: Callable[..., jax.Array]
    typed: bool = True


BACKENDS = {
    "blocks": Backend(blocks.rows_times_groups, blocks.group_products),
    "ragged_dot": Backend(ragged_dot.rows_times_groups, ragged_dot.group_products),
    "megablox": Backend(megablox.rows_times_groups, megablox.group_products, typed=False),
    "tokamax": Backend(tokamax.rows_times_groups, tokamax.group_products, typed=False),
    "loop": Backend(loop.rows_times_groups, loop.group_products),
}
_logged: set[str] = set()


def resolve_backend(backend: str | None = None) -> str:
    """What "auto" or None means for the platform that the program is for (`compat.target_platform`): `blocks` on a CPU,
    `megablox` on a TPU, `tokamax` on a GPU where it is installed, else `blocks`.

    On a TPU `ragged_dot` has a kernel of its own for the rows, but multiplies every row with every group for the gradient of
    the matrices (compiled with jax 0.10.2 and 0.12.0).

    Raises:
      ValueError: the backend is unknown, or its package is missing.
    """
    if backend in (None, "auto"):
        platform = compat.target_platform()
        on_gpu = "tokamax" if tokamax.is_installed() else "blocks"
        backend = {"tpu": "megablox", "gpu": on_gpu, "cuda": on_gpu}.get(platform, "blocks")
    if backend not in BACKENDS:
        raise ValueError(f"grouped_matmul backend={backend!r}: one of {', '.join(BACKENDS)}, auto")
    if backend == "tokamax" and not tokamax.is_installed():
        raise ValueError("grouped_matmul backend='tokamax': the package is missing; pip install tokamax")
    if backend not in _logged:
        _logged.add(backend)
        logging.getLogger(__name__).info("grouped_matmul: %s", backend)
    return backend


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_matmul(lhs, rhs, group_sizes, out_dtype, backend):
    return BACKENDS[backend].rows_times_groups(lhs, rhs, group_sizes, out_dtype)


def _forward(lhs, rhs, group_sizes, out_dtype, backend):
    return _grouped_matmul(lhs, rhs, group_sizes, out_dtype, backend), (lhs, rhs, group_sizes)


def _backward(out_dtype, backend, residuals, d_out):
    lhs, rhs, group_sizes = residuals
    d_out = d_out.astype(lhs.dtype)
    run = BACKENDS[backend]
    d_lhs = run.rows_times_groups(d_out, rhs, group_sizes, lhs.dtype, transposed=True)
    return d_lhs, run.group_products(lhs, d_out, group_sizes, rhs.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


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
      backend: one of `BACKENDS`, or None: see `resolve_backend`.

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
    return _grouped_matmul(lhs, rhs, group_sizes, out_dtype, resolve_backend(backend))
