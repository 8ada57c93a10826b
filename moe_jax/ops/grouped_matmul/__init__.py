"""Grouped matrix product: consecutive groups of rows, each times its own matrix. One file per backend."""

import functools
import logging
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import compat
from moe_jax.ops.grouped_matmul import blocks, loop, megablox, ragged_dot, tokamax
from moe_jax.ops.precision import standard_promotion


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def rows_times_groups(lhs, rhs, group_sizes, out_dtype, transposed, backend):
    """That of a backend, differentiable any number of times. All floats are of one dtype, but for `out_dtype`."""
    return BACKENDS[backend].rows_times_groups(lhs, rhs, group_sizes, out_dtype, transposed=transposed)


def _rows_forward(lhs, rhs, group_sizes, out_dtype, transposed, backend):
    return rows_times_groups(lhs, rhs, group_sizes, out_dtype, transposed, backend), (lhs, rhs, group_sizes)


@standard_promotion()
def _rows_backward(out_dtype, transposed, backend, residuals, d_out):
    lhs, rhs, group_sizes = residuals
    d_out = d_out.astype(lhs.dtype)
    d_lhs = rows_times_groups(d_out, rhs, group_sizes, lhs.dtype, not transposed, backend)
    pair = (d_out, lhs) if transposed else (lhs, d_out)
    return d_lhs, group_products(*pair, group_sizes, rhs.dtype, backend), None


rows_times_groups.defvjp(_rows_forward, _rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_products(lhs, d_out, group_sizes, out_dtype, backend):
    """That of a backend, differentiable any number of times."""
    return BACKENDS[backend].group_products(lhs, d_out, group_sizes, out_dtype)


def _products_forward(lhs, d_out, group_sizes, out_dtype, backend):
    return group_products(lhs, d_out, group_sizes, out_dtype, backend), (lhs, d_out, group_sizes)


@standard_promotion()
def _products_backward(out_dtype, backend, residuals, d_products):
    lhs, d_out, group_sizes = residuals
    d_products = d_products.astype(lhs.dtype)
    d_lhs = rows_times_groups(d_out, d_products, group_sizes, lhs.dtype, True, backend)
    return d_lhs, rows_times_groups(lhs, d_products, group_sizes, d_out.dtype, False, backend), None


group_products.defvjp(_products_forward, _products_backward)


@standard_promotion()
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
      Products accumulate in float32 at least. Reverse-mode gradients of any order; no forward mode (`jax.jvp`).

    Raises:
      ValueError: in one line: shapes that do not fit, dtypes that are not floats or, of the sizes, integers; an
        unknown backend; sizes below 0 or with a sum above M, where their values are known: inside jit they are not.
    """
    lhs, rhs, group_sizes = jnp.asarray(lhs), jnp.asarray(rhs), jnp.asarray(group_sizes)
    dtype = jnp.result_type(lhs, rhs)
    out_dtype = jnp.dtype(preferred_element_type or dtype)
    _check_operands(lhs, rhs, group_sizes, out_dtype)
    lhs, rhs, group_sizes = compat.vary_alike(lhs.astype(dtype), rhs.astype(dtype), group_sizes)
    return rows_times_groups(lhs, rhs, group_sizes, out_dtype, False, resolve_backend(backend))


def _check_operands(lhs, rhs, group_sizes, out_dtype):
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1] or group_sizes.shape != rhs.shape[:1]:
        raise ValueError(
            "grouped_matmul wants lhs [M, D], rhs [E, D, F], group_sizes [E]; "
            f"got {lhs.shape}, {rhs.shape}, {group_sizes.shape}"
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul wants integer group_sizes; got {group_sizes.dtype}")
    for name, dtype in {"lhs": lhs.dtype, "rhs": rhs.dtype, "preferred_element_type": out_dtype}.items():
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"grouped_matmul {name}: {dtype}, not a float dtype; use float32, or another float")
    if isinstance(group_sizes, jax.core.Tracer) or not group_sizes.is_fully_addressable:
        return
    sizes = np.asarray(group_sizes)
    if (sizes < 0).any():
        raise ValueError(f"grouped_matmul group_sizes: one is {sizes.min()}; use 0 or more")
    if (total := sizes.sum(dtype=np.int64)) > lhs.shape[0]:
        raise ValueError(f"grouped_matmul group_sizes: a sum of {total}, for M={lhs.shape[0]} rows; use at most M")
