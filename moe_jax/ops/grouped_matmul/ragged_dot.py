"""`jax.lax.ragged_dot`: a grouped kernel on TPU; on a CPU it does the work of all groups for every row."""

import jax
import jax.numpy as jnp

from moe_jax.ops.counting import real_rows
from moe_jax.ops.precision import accumulator

_CONTRACT_GROUPS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)
_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def rows_times_groups(lhs, rhs, group_sizes, out_dtype, *, transposed=False):
    """[M, D] x [E, D, F] -> [M, F], or with `transposed` [M, F] x [E, D, F] -> [M, D]."""
    options = {"preferred_element_type": accumulator(lhs.dtype)}
    group_sizes = group_sizes.astype(jnp.int32)
    # Kernels may leave the tail uninitialised, so it is cut off on both sides of the product.
    real = real_rows(lhs.shape[0], group_sizes)
    lhs = jnp.where(real, lhs, 0)
    if transposed:
        out = jax.lax.ragged_dot_general(lhs, rhs, group_sizes, _TRANSPOSED, **options)
    else:
        out = jax.lax.ragged_dot(lhs, rhs, group_sizes, **options)
    return jnp.where(real, out, 0).astype(out_dtype)


def group_products(lhs, d_out, group_sizes, out_dtype):
    """[M, D], [M, F] -> [E, D, F]: the sum over each group's rows of lhs^T d_out."""
    group_sizes = group_sizes.astype(jnp.int32)
    real = real_rows(lhs.shape[0], group_sizes)
    lhs, d_out = jnp.where(real, lhs, 0), jnp.where(real, d_out, 0)
    out = jax.lax.ragged_dot_general(lhs, d_out, group_sizes, _CONTRACT_GROUPS, preferred_element_type=accumulator(lhs.dtype))
    return out.astype(out_dtype)
