"""`jax.lax.ragged_dot`: a grouped kernel on TPU; on a CPU it does the work of all groups for every row."""

import jax
import jax.numpy as jnp


def grouped_matmul(lhs, rhs, group_sizes, out_dtype):
    """See `moe_jax.ops.grouped_matmul.grouped_matmul`."""
    accumulator = jnp.promote_types(lhs.dtype, jnp.float32)
    group_sizes = group_sizes.astype(jnp.int32)
    # Kernels may leave the tail uninitialised, so it is cut off on both sides of the product.
    real = (jnp.arange(lhs.shape[0]) < jnp.sum(group_sizes))[:, None]
    out = jax.lax.ragged_dot(jnp.where(real, lhs, 0), rhs, group_sizes, preferred_element_type=accumulator)
    return jnp.where(real, out, 0).astype(out_dtype)
