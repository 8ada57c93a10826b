"""What a router did in one call: sums and histograms over the valid tokens, which join by addition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.ops.counting import count_experts
from moe_jax.types import Assignment, ExpertChoice, SlotMix, TokenChoice


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


def retrieval_statistics(choice: TokenChoice, shares, routed, finite, experts: int, train: bool) -> dict[str, jax.Array]:
    """The statistics of routers that retrieve some of very many experts; all additive over microbatches.

    Args:
      choice: [T, H*K].
      shares: [T, H, K], of the gates of each head; they sum to 1.
      routed, finite: as in `choice_statistics`.
      experts: N.
      train: whether in training.

    Returns:
      tokens, entropy_sum (nats, a mean over heads), nonfinite; outside training mass [N], the sum of the absolute gates of each
      expert.
    """
    heads = shares.shape[1]
    stats = token_statistics(shares.reshape(-1, shares.shape[-1]), jnp.repeat(routed, heads), finite)
    stats |= {"tokens": jnp.sum(routed), "entropy_sum": stats["entropy_sum"] / heads}
    if not train:
        mass = jnp.zeros(experts, choice.gates.dtype)
        stats["mass"] = mass.at[choice.expert_ids].add(jnp.abs(choice.gates), mode="drop")
    return stats


@functools.partial(jax.tree_util.register_dataclass, data_fields=["counts"], meta_fields=["low", "high"])
@dataclasses.dataclass(frozen=True)
class Histogram:
    """How many values fell into each of some equal bins from `low` to `high`; values outside are in the first and the last.

    counts: float32 [..., bins]. Histograms of the same bins add. So a quantile does not depend on how a step is cut into
    microbatches, devices or blocks.
    """

    counts: jax.Array
    low: float
    high: float

    @property
    def width(self) -> float:
        """The width of a bin, which is the resolution of a quantile."""
        return (self.high - self.low) / self.counts.shape[-1]

    def quantile(self, share: float | jax.Array) -> jax.Array:
        """The upper edge [...] of the first bin at which `share` of the values is reached; `low` without values."""
        reached = jnp.cumsum(self.counts, axis=-1)
        total = reached[..., -1:]
        bins = jnp.sum(reached < share * total, axis=-1)
        return jnp.where(total[..., 0] > 0, self.low + self.width * jnp.minimum(bins + 1, self.counts.shape[-1]), self.low)


def histogram(values: jax.Array, counted: jax.Array, low: float, high: float, bins: int) -> Histogram:
    """The histogram of each column of [T, N], or of [T], over the tokens in `counted`, bool [T]; without a gradient."""
    values = jax.lax.stop_gradient(values)
    index = jnp.clip(jnp.floor((values - low) * (bins / (high - low))), 0, bins - 1).astype(jnp.int32)
    weights = jnp.broadcast_to(counted.reshape(-1, *[1] * (values.ndim - 1)), values.shape).astype(jnp.float32)
    column = jnp.broadcast_to(jnp.arange(values[0].size).reshape(values.shape[1:]), values.shape)
    flat = jnp.zeros((values[0].size, bins), jnp.float32).at[column.reshape(-1), index.reshape(-1)].add(weights.reshape(-1))
    return Histogram(flat.reshape(*values.shape[1:], bins), low, high)


def running_mean(before: jax.Array, value: jax.Array, number: jax.Array, decay: float) -> jax.Array:
    """The mean of the values so far, from the one before: the plain mean at first, later that with `decay`.

    number: of the value, from 1.
    """
    return before + jnp.maximum(1 - decay, 1 / jnp.maximum(number, 1).astype(before.dtype)) * (
        value.astype(before.dtype) - before
    )


def experts_by_row(expert_ids: jax.Array, valid: jax.Array | None, experts: int, rows: int) -> jax.Array:
    """float32 [B]: how many experts a valid token of each of B = `rows` rows chose on average.

    Args:
      expert_ids: int32 [T, K], row after row.
      valid: bool [T]; None: all.
      experts: E; other ids are no experts, or virtual ones.
    """
    chosen = jnp.sum((expert_ids < experts).reshape(rows, -1), axis=1, dtype=jnp.float32)
    tokens = jnp.ones(expert_ids.shape[:1], bool) if valid is None else valid
    return chosen / jnp.maximum(jnp.sum(tokens.reshape(rows, -1), axis=1, dtype=jnp.float32), 1)


def sums(stats: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`stats` as float32 without a gradient."""
    return jax.tree.map(lambda a: jax.lax.stop_gradient(a).astype(jnp.float32), stats)


def column_counts(stats: dict[str, jax.Array]) -> jax.Array:
    """[E+V] assignments of the experts and the virtual experts."""
    return jnp.concatenate([stats["counts"], stats.get("virtual_counts", jnp.zeros(0, jnp.float32))])


def matrix(assignment: Assignment, tokens: int, experts: int, virtual: int) -> jax.Array:
    """The sparse matrix as a dense one, float32 [T, E+V]: the gate of each token and expert.

    A gate that underflowed to 0 is the least normal number: the expert was chosen all the same.
    """
    if isinstance(assignment, SlotMix):
        return sums({"": jnp.sum(assignment.combine, axis=-1)})[""]
    columns = experts + 1 + virtual
    gates = jax.lax.stop_gradient(assignment.gates).astype(jnp.float32)
    gates = jnp.where(gates == 0, jnp.finfo(jnp.float32).tiny, gates)
    dense = jnp.zeros((tokens, columns), jnp.float32)
    if isinstance(assignment, ExpertChoice):
        column = jnp.broadcast_to(jnp.arange(experts)[:, None], gates.shape)
        dense = dense.at[assignment.token_ids, column].add(gates, mode="drop")
    else:
        dense = dense.at[jnp.arange(tokens)[:, None], assignment.expert_ids].add(gates)
    return jnp.delete(dense, experts, axis=1)  # "no expert"
