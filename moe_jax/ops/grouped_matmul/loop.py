"""The reference: one masked dense product per group. Slow, obvious, differentiated by JAX itself."""

import jax
import jax.numpy as jnp


def grouped_matmul(lhs, rhs, group_sizes, out_dtype):
    """See `moe_jax.ops.grouped_matmul.grouped_matmul`."""
    accumulator = jnp.promote_types(lhs.dtype, jnp.float32)
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(lhs.shape[0])[:, None]
    out = jnp.zeros((lhs.shape[0], rhs.shape[2]), accumulator)
    for e in range(rhs.shape[0]):
        mine = (rows >= ends[e] - group_sizes[e]) & (rows < ends[e])
        # Masked before the product too, so that NaN in other rows cannot reach this group's gradient.
        x = jnp.where(mine, lhs, 0)
        product = jnp.dot(x, rhs[e], precision=jax.lax.Precision.HIGHEST, preferred_element_type=accumulator)
        out = jnp.where(mine, product, out)
    return out.astype(out_dtype)
