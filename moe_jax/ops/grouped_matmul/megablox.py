"""Megablox, the grouped Pallas kernel for TPUs that comes with JAX; interpreted (slowly) on any other platform."""

import functools
import importlib

import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.counting import real_rows
from moe_jax.ops.precision import accumulator


@functools.cache
def _kernels():
    # The package's name `gmm` is the function on some versions, the module on others. Imported late: it pulls in Pallas.
    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


def _tile(size: int, most: int) -> int:
    """Largest of most, most/2, ... 128 that divides `size` rounded up to 128: a last tile that is half empty costs as
    much as a full one."""
    size = -(-size // 128) * 128
    while most > 128 and size % most:
        most //= 2
    return min(most, size)


def _prepare(group_sizes, *arrays):
    """int32 sizes, arrays padded to a multiple of the row tile and with 0 past the last group, and the tile."""
    if arrays[0].dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"megablox takes float32 or bfloat16; got {arrays[0].dtype}; use another backend")
    rows = arrays[0].shape[0]
    tile = _tile(rows, 512)
    padded = -(-rows // tile) * tile
    group_sizes = group_sizes.astype(jnp.int32)
    real = real_rows(padded, group_sizes)
    arrays = [jnp.where(real, jnp.pad(a, ((0, padded - rows), (0, 0))), 0) for a in arrays]
    return group_sizes, real, tile, arrays


def rows_times_groups(lhs, rhs, group_sizes, out_dtype, *, transposed=False):
    """[M, D] x [E, D, F] -> [M, F], or with `transposed` [M, F] x [E, D, F] -> [M, D]."""
    rows, width = lhs.shape[0], rhs.shape[1 if transposed else 2]
    group_sizes, real, tile, (lhs,) = _prepare(group_sizes, lhs)
    out = _kernels().gmm(
        lhs,
        rhs,
        group_sizes,
        jnp.dtype(out_dtype),
        tiling=(tile, _tile(lhs.shape[1], 1024), _tile(width, 1024)),
        transpose_rhs=transposed,
        interpret=compat.target_platform() != "tpu",
    )
    # The kernel leaves rows past the last group as they were in memory.
    return jnp.where(real, out, 0)[:rows]


def group_products(lhs, d_out, group_sizes, out_dtype):
    """[M, D], [M, F] -> [E, D, F]: the sum over each group's rows of lhs^T d_out."""
    group_sizes, _, tile, (lhs, d_out) = _prepare(group_sizes, lhs, d_out)
    out = _kernels().tgmm(
        lhs.T,
        d_out,
        group_sizes,
        accumulator(lhs.dtype),
        tiling=(tile, _tile(lhs.shape[1], 512), _tile(d_out.shape[1], 512)),
        interpret=compat.target_platform() != "tpu",
    )
    # Groups without rows are not visited.
    return jnp.where(group_sizes[:, None, None] > 0, out, 0).astype(out_dtype)
