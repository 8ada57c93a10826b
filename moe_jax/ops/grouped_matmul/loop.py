"""The reference: one masked dense product per group. Slow and obvious."""

import jax
import jax.numpy as jnp

from moe_jax.ops.precision import accumulator


def _masks(rows, group_sizes):
    ends = jnp.cumsum(group_sizes)
    index = jnp.arange(rows)[:, None]
    return [(index >= end - size) & (index < end) for size, end in zip(group_sizes, ends)]


def _dot(a, b):
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=accumulator(a.dtype))


def rows_times_groups(lhs, rhs, group_sizes, out_dtype, *, transposed=False):
    """[M, D] x [E, D, F] -> [M, F], or with `transposed` [M, F] x [E, D, F] -> [M, D]."""
    rhs = rhs.swapaxes(1, 2) if transposed else rhs
    out = jnp.zeros((lhs.shape[0], rhs.shape[2]), out_dtype)
    for in_group, matrix in zip(_masks(lhs.shape[0], group_sizes), rhs):
        out = jnp.where(in_group, _dot(lhs, matrix).astype(out_dtype), out)
    return out


def group_products(lhs, d_out, group_sizes, out_dtype):
    """[M, D], [M, F] -> [E, D, F]: the sum over each group's rows of lhs^T d_out."""
    products = [
        _dot(jnp.where(in_group, lhs, 0).T, jnp.where(in_group, d_out, 0)) for in_group in _masks(lhs.shape[0], group_sizes)
    ]
    return jnp.stack(products).astype(out_dtype)
