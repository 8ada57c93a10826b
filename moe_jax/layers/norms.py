"""Normalisation over the last axis, with statistics in at least float32."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

NORMS = ("rmsnorm", "layernorm")


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Divides by the root mean square: `scale * x / sqrt(mean(x^2) + epsilon)` (arXiv:1910.07467).

    Args:
      x: [..., D] of any float dtype.
      scale: [D].
      epsilon: added to the mean square.

    Returns:
      [..., D] of `promote_types(x.dtype, float32)`.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale.astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Subtracts the mean and divides by the standard deviation (arXiv:1607.06450).

    Args:
      x: [..., D] of any float dtype.
      scale: [D].
      bias: [D].
      epsilon: added to the variance.

    Returns:
      [..., D] of `promote_types(x.dtype, float32)`.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # The variance of the centred values, not E[x^2] - E[x]^2: that loses all digits at a large mean.
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return x * scale.astype(x.dtype) + bias.astype(x.dtype)


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


def make_norm(
    kind: str, epsilon: float = 1e-6, dtype: Any = jnp.float32, name: str | None = None
) -> nn.Module:
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
