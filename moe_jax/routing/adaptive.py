"""Adaptive gating: one expert, or two where the two best probabilities are close (arXiv:2310.07188)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config.routers import AdaptiveConfig
from moe_jax.ops.counting import count_experts
from moe_jax.routing.contract import Router, Sizes, Step, best, score_by_kernel, token_choice
from moe_jax.routing.losses import balance_loss, z_loss
from moe_jax.routing.statistics import choice_statistics, histogram, running_mean, sums
from moe_jax.types import RouterInputs, TokenChoice

# The controller's thresholds are whole bins of 1/1024.
BINS = 1024


def gap_of_two_best(pair: jax.Array, reading: str) -> jax.Array:
    """[T], from 0 to 1: how far the best probability is above the second.

    The paper compares a "normalised" gap and does not say by what.

    Args:
      pair: [T, 2], the two best, the best first.
      reading: "raw", "pair" or "max", see `AdaptiveConfig.gap`.
    """
    by = {"raw": 1.0, "pair": pair[:, 0] + pair[:, 1], "max": pair[:, 0]}[reading]
    return (pair[:, 0] - pair[:, 1]) / by


class Adaptive(nn.Module):
    """The router `adaptive`: parameter `kernel` [D, E+V]; with a target the state `threshold`, a scalar.

    A second expert that is not wanted is "no expert": no row of it is in a product. The gates are the raw probabilities, by
    which the router of a token with one expert learns.
    """

    experts: int
    virtual: int = 0
    options: AdaptiveConfig = AdaptiveConfig()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice with K = 2, losses `balance` (equation 4) and `z`, stats).

        The stats have `two_experts_tokens`, how many tokens took two, and in training with a target `gap`, a histogram.
        """
        o, columns, threshold = self.options, self.experts + self.virtual, self.options.threshold
        if o.target_k:
            threshold = self.variable("router_state", "threshold", jnp.full, (), threshold, jnp.float32).value
        logits, routed, finite = score_by_kernel(self, x, inputs, columns)
        probabilities = jax.nn.softmax(logits, axis=-1)
        ids = best(probabilities, 2)
        gates = jnp.take_along_axis(probabilities, ids, axis=-1)
        gap = jax.lax.stop_gradient(gap_of_two_best(gates, o.gap))
        if o.evaluation_threshold >= 0 and not inputs.train:
            threshold = o.evaluation_threshold
        two = gap <= threshold
        if o.evaluation_k and not inputs.train:
            two = jnp.full_like(two, o.evaluation_k == 2)
        if o.renormalise_pair:
            gates = jnp.where(two[:, None], gates / jnp.sum(gates, axis=-1, keepdims=True), gates)
        choice = token_choice(ids, gates, jnp.stack([routed, routed & two], axis=1), self.experts)
        stats = choice_statistics(choice.expert_ids, probabilities, routed, finite, self.experts)
        stats |= sums({"two_experts_tokens": jnp.sum(two & routed)})
        if o.target_k and inputs.train:
            stats["gap"] = histogram(gap, routed, 0.0, 1.0, BINS)
        counted = routed & ~two if o.balance_over == "single" else routed
        first = count_experts(jnp.where(counted, ids[:, 0], columns), columns)
        return choice, {"balance": balance_loss(probabilities, first, routed), "z": z_loss(logits, routed)}, stats


def update(state: dict, step: Step, sizes: Sizes, options: AdaptiveConfig) -> dict:
    """A threshold nearer to the one at which target_k experts per token would have run, over all blocks of the layer."""
    wanted = step.total["gap"].quantile(options.target_k - 1)
    return {"threshold": running_mean(state["threshold"], wanted, step.number, options.target_decay)}


ROUTER = Router(
    build=lambda sizes, options: Adaptive(sizes.experts, sizes.virtual, options, parent=None),
    loss_weights=lambda options: {"balance": options.balance_loss, "z": options.z_loss},
    update=update,
)
