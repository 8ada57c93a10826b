"""Auxiliary losses of routers: unweighted float32 scalars over the valid tokens of the call."""

import jax
import jax.numpy as jnp


def balance_loss(probabilities: jax.Array, counts: jax.Array, valid: jax.Array) -> jax.Array:
    """E * sum_e f_e P_e, the Switch form: 1 when even, E when all go to one expert.

    arXiv 2101.03961, equations 4 to 6.

    Args:
      probabilities: [T, E].
      counts: [E] assignments before any is dropped; f is their share, so that even is 1 for every K. No
        gradient.
      valid: bool [T].
    """
    mean = jnp.sum(jnp.where(valid[:, None], probabilities, 0), axis=0) / jnp.maximum(jnp.sum(valid), 1)
    counts = jax.lax.stop_gradient(counts).astype(mean.dtype)
    return probabilities.shape[1] * jnp.sum(counts / jnp.maximum(jnp.sum(counts), 1) * mean)


def z_loss(logits: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean over valid tokens of logsumexp(logits [T, E])^2 (ST-MoE, arXiv 2202.08906, equation 5)."""
    # Masked before the square: padding may hold anything, and 0 * inf would not be 0.
    z = jax.nn.logsumexp(jnp.where(valid[:, None], logits, 0), axis=-1)
    return jnp.sum(jnp.where(valid, z, 0) ** 2) / jnp.maximum(jnp.sum(valid), 1)
