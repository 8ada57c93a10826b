"""Sums over one call's valid tokens that say what a router did."""

import jax
import jax.numpy as jnp

from moe_jax.ops.counting import count_experts


def choice_statistics(expert_ids, probabilities, valid, finite) -> dict[str, jax.Array]:
    """The statistics every token-choice router returns; all additive over microbatches, float32.

    Args:
      expert_ids: int32 [T, K]; "no expert" is E.
      probabilities: [T, E].
      valid: bool [T], real tokens that were routed.
      finite: bool [T], false for real tokens whose logits were NaN or infinite.

    Returns:
      counts [E], tokens, entropy_sum (nats), nonfinite (tokens).
    """
    p = jnp.where(valid[:, None], probabilities, 1.0)  # entropy 0
    entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny)), axis=-1)
    return jax.tree.map(
        lambda a: jax.lax.stop_gradient(a).astype(jnp.float32),
        {
            "counts": count_experts(expert_ids, probabilities.shape[1]),
            "tokens": jnp.sum(valid),
            "entropy_sum": jnp.sum(entropy),
            "nonfinite": jnp.sum(~finite),
        },
    )
