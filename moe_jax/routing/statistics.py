"""Sums over one call's valid tokens that say what a router did."""

import jax
import jax.numpy as jnp

from moe_jax.ops.counting import count_experts
from moe_jax.types import Assignment, ExpertChoice, SlotMix


def choice_statistics(expert_ids, probabilities, routed, finite, experts: int) -> dict[str, jax.Array]:
    """The statistics every token-choice router returns; all additive over microbatches, float32.

    Args:
      expert_ids: int32 [T, K]; "no expert" is E, virtual expert j is E+1+j.
      probabilities: [T, E+V].
      routed: bool [T], real tokens that were routed.
      finite: bool [T], false for real tokens whose logits were NaN or infinite.
      experts: E.

    Returns:
      counts [E], tokens, entropy_sum (nats), nonfinite (tokens), and with V > 0 virtual_counts [V].
    """
    virtual = probabilities.shape[1] - experts
    stats = {
        "counts": count_experts(expert_ids, experts),
        **token_statistics(probabilities, routed, finite),
    }
    if virtual:
        stats["virtual_counts"] = count_experts(expert_ids - experts - 1, virtual)
    return sums(stats)


def token_statistics(probabilities, routed, finite) -> dict[str, jax.Array]:
    """tokens, entropy_sum and nonfinite, as in `choice_statistics`."""
    p = jnp.where(routed[:, None], probabilities, 1.0)  # entropy 0
    entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny)), axis=-1)
    return {"tokens": jnp.sum(routed), "entropy_sum": jnp.sum(entropy), "nonfinite": jnp.sum(~finite)}


def sums(stats: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`stats` as float32 without a gradient."""
    return jax.tree.map(lambda a: jax.lax.stop_gradient(a).astype(jnp.float32), stats)


def column_counts(stats: dict[str, jax.Array]) -> jax.Array:
    """[E+V] assignments of the experts and the virtual experts."""
    return jnp.concatenate([stats["counts"], stats.get("virtual_counts", jnp.zeros(0, jnp.float32))])


def matrix(assignment: Assignment, tokens: int, experts: int, virtual: int) -> jax.Array:
    """The sparse matrix as a dense one, float32 [T, E+V]: the gate of each token and expert."""
    if isinstance(assignment, SlotMix):
        return sums({"": jnp.sum(assignment.combine, axis=-1)})[""]
    columns = experts + 1 + virtual
    gates = jax.lax.stop_gradient(assignment.gates).astype(jnp.float32)
    dense = jnp.zeros((tokens, columns), jnp.float32)
    if isinstance(assignment, ExpertChoice):
        column = jnp.broadcast_to(jnp.arange(experts)[:, None], gates.shape)
        dense = dense.at[assignment.token_ids, column].add(gates, mode="drop")
    else:
        dense = dense.at[jnp.arange(tokens)[:, None], assignment.expert_ids].add(gates)
    return jnp.delete(dense, experts, axis=1)  # "no expert"
