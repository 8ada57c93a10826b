"""Normalisation over the last axis, or over tokens, with statistics in at least float32."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.ops.precision import accumulator


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Divides by the root mean square: `scale * x / sqrt(mean(x^2) + epsilon)` (arXiv:1910.07467).

    Args:
      x: [..., D] of any float dtype.
      scale: [D].
      epsilon: added to the mean square.

    Returns:
      [..., D] of `accumulator(x.dtype)`.
    """
    x = x.astype(accumulator(x.dtype))
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale.astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Subtracts the mean and divides by the standard deviation (arXiv:1607.06450).

    Args:
      x: [..., D] of any float dtype.
      scale: [D].
      bias: [D].
      epsilon: added to the variance.

    Returns:
      [..., D] of `accumulator(x.dtype)`.
    """
    x = x.astype(accumulator(x.dtype))
    # The variance of the centred values, not E[x^2] - E[x]^2: that loses all digits at a large mean.
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return x * scale.astype(x.dtype) + bias.astype(x.dtype)


def norm_before(rows: jax.Array, vectors: Mapping[str, jax.Array], epsilon: float) -> jax.Array:
    """The norm before an expert's projections: none, or by `norm_scale` (RMS norm), with `norm_bias` (layer norm).

    Args:
      rows: [..., D] of any float dtype, which the result has.
      vectors: of the expert, whatever else is among them; broadcast against `rows`.
      epsilon: of the norm.
    """
    if "norm_scale" not in vectors:
        return rows
    if "norm_bias" in vectors:
        return layer_norm(rows, vectors["norm_scale"], vectors["norm_bias"], epsilon).astype(rows.dtype)
    return rms_norm(rows, vectors["norm_scale"], epsilon).astype(rows.dtype)


def moments(x: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance [D] over those of the tokens x [T, D] that are counted, bool [T]; 0 and 1 if none is.

    Under a mesh of Auto axes over the tokens of all devices. The variance is divided by the number of tokens.
    """
    x = x.astype(accumulator(x.dtype))
    weights = counted.astype(x.dtype)[:, None]
    count = jnp.sum(weights)
    mean = jnp.sum(weights * x, axis=0) / jnp.maximum(count, 1)
    variance = jnp.sum(weights * jnp.square(x - mean), axis=0) / jnp.maximum(count, 1)
    return mean, jnp.where(count > 0, variance, 1)


def batch_norm(
    x: jax.Array, mean: jax.Array, variance: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
    """`scale * (x - mean) / sqrt(variance + epsilon) + bias` for every feature (arXiv:1502.03167).

    Args:
      x: [..., D] of any float dtype.
      mean, variance, scale, bias: [D]; the first two of a batch, or running ones.
      epsilon: added to the variance.

    Returns:
      [..., D] of `accumulator(x.dtype)`.
    """
    x = x.astype(accumulator(x.dtype))
    mean, factor = mean.astype(x.dtype), jax.lax.rsqrt(variance.astype(x.dtype) + epsilon)
    return (x - mean) * (factor * scale.astype(x.dtype)) + bias.astype(x.dtype)
