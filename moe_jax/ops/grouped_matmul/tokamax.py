"""tokamax's grouped kernels for NVIDIA GPUs (Mosaic on H100 and newer, else Triton). Needs the package `tokamax`."""

import importlib.util

import jax
import jax.numpy as jnp

from moe_jax.ops.counting import real_rows


def is_installed() -> bool:
    """Whether the package is there; it is imported at the first use."""
    return importlib.util.find_spec("tokamax") is not None


def _ragged_dot(lhs, rhs, group_sizes, out_dtype):
    import tokamax
    from absl import flags

    # It reads absl flags, and where nobody has parsed any it would parse the command line of whatever runs.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return tokamax.ragged_dot(lhs, rhs, group_sizes=group_sizes, preferred_element_type=out_dtype)


def rows_times_groups(lhs, rhs, group_sizes, out_dtype, *, transposed=False):
    """[M, D] x [E, D, F] -> [M, F], or with `transposed` [M, F] x [E, D, F] -> [M, D]."""
    group_sizes = group_sizes.astype(jnp.int32)
    real = real_rows(lhs.shape[0], group_sizes)
    lhs = jnp.where(real, lhs, 0)
    if transposed:
        # The pullback of the product, as the package has it: its kernel reads rhs transposed.
        primal = jnp.zeros((lhs.shape[0], rhs.shape[1]), lhs.dtype)
        out = jax.vjp(lambda x: _ragged_dot(x, rhs, group_sizes, lhs.dtype), primal)[1](lhs)[0]
    else:
        out = _ragged_dot(lhs, rhs, group_sizes, out_dtype)
    return jnp.where(real, out, 0).astype(out_dtype)


def group_products(lhs, d_out, group_sizes, out_dtype):
    """[M, D], [M, F] -> [E, D, F]: the sum over each group's rows of lhs^T d_out."""
    group_sizes = group_sizes.astype(jnp.int32)
    real = real_rows(lhs.shape[0], group_sizes)
    lhs, d_out = jnp.where(real, lhs, 0), jnp.where(real, d_out, 0)
    primal = jnp.zeros((group_sizes.shape[0], lhs.shape[1], d_out.shape[1]), lhs.dtype)
    out = jax.vjp(lambda w: _ragged_dot(lhs, w, group_sizes, d_out.dtype), primal)[1](d_out)[0]
    return out.astype(out_dtype)
