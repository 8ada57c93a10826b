"""Normalisation over the last axis, with statistics in at least float32."""

import jax
import jax.numpy as jnp


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
