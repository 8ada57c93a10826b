"""In which dtype sums are taken, and by which rules dtypes and shapes are promoted."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe_jax import compat


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """JAX's standard promotion inside a public call, whatever `jax_numpy_dtype_promotion` and `jax_numpy_rank_promotion` the
    caller has set for code of their own. As a decorator also of custom_vjp's backward functions: JAX runs them after the call.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def accumulator(dtype) -> jnp.dtype:
    """The dtype of sums over values of `dtype`: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def batched_product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, with a result in `accumulator` of it.

    XLA's CPU backend (jax 0.10.2) has no bfloat16 product with a float32 result for some layouts of batched operands: the call
    fails when it runs, not when it compiles. There the operands are widened first, which changes no product of two
    bfloat16 values.
    """
    wide = accumulator(a.dtype)
    if compat.target_platform() == "cpu":
        a, b = a.astype(wide), b.astype(wide)
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide)
