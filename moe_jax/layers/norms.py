"""Normalisation over the last axis, with statistics in at least float32."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.ops.norms import layer_norm, rms_norm

NORMS = ("rmsnorm", "layernorm")


class RMSNorm(nn.Module):
    """`rms_norm` with a learned `scale` [D].

    Attributes:
      epsilon: added to the mean square.
      dtype: dtype of the result; the statistics are at least float32.
      param_dtype: dtype of the parameter.
      axis_name: logical axis of the parameter.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str = "norm"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [..., D] of any float dtype; returns [..., D] of `dtype`."""
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), (self.axis_name,))
        scale = self.param("scale", ones, (x.shape[-1],), self.param_dtype)
        return rms_norm(x, scale, self.epsilon).astype(self.dtype)


class LayerNorm(nn.Module):
    """`layer_norm` with a learned `scale` [D] and `bias` [D].

    Attributes:
      epsilon: added to the variance.
      dtype: dtype of the result; the statistics are at least float32.
      param_dtype: dtype of the parameters.
      axis_name: logical axis of the parameters.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str = "norm"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [..., D] of any float dtype; returns [..., D] of `dtype`."""
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), (self.axis_name,))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), (self.axis_name,))
        scale = self.param("scale", ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", zeros, (x.shape[-1],), self.param_dtype)
        return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


def make_norm(kind: str, epsilon: float = 1e-6, dtype: Any = jnp.float32, name: str | None = None) -> nn.Module:
    """The normalisation layer of that name.

    Args:
      kind: one of `NORMS`.
      epsilon: added to the variance.
      dtype: dtype of the result.
      name: name of the module; None: Linen's.

    Returns:
      An `RMSNorm` or a `LayerNorm`.

    Raises:
      ValueError: `kind` is unknown.
    """
    if kind == "rmsnorm":
        return RMSNorm(epsilon=epsilon, dtype=dtype, name=name)
    if kind == "layernorm":
        return LayerNorm(epsilon=epsilon, dtype=dtype, name=name)
    raise ValueError(f"norm={kind!r} is unknown; use one of {', '.join(NORMS)}")
