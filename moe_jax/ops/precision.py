"""In which dtype sums are taken. Under any `jax_numpy_dtype_promotion`, "strict" too."""

import jax
import jax.numpy as jnp

from moe_jax import compat


def common_dtype(*arrays) -> jnp.dtype:
    """The dtype that arrays, or dtypes, are promoted to by JAX's standard rules."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays)


def accumulator(dtype) -> jnp.dtype:
    """The dtype of sums over values of `dtype`: float32 at least."""
    return common_dtype(dtype, jnp.float32)


def batched_product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, with a result in `accumulator` of it.

    XLA's CPU backend (jax 0.10.2) has no bfloat16 product with a float32 result for some layouts of batched operands: the call
    fails when it runs, not when it compiles. There the operands are widened first, which changes no product of two bfloat16 values.
    """
    wide = accumulator(a.dtype)
    if compat.target_platform() == "cpu":
        a, b = a.astype(wide), b.astype(wide)
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide)
