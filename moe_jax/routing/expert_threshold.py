"""Expert threshold: each expert takes the tokens that score above its threshold, a moving quantile (arXiv:2603.11535)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config.routers import ExpertThresholdConfig
from moe_jax.routing.contract import Router, Sizes, Step, every_positive, score_by_kernel
from moe_jax.routing.losses import z_loss
from moe_jax.routing.statistics import choice_statistics, histogram, running_mean, sums
from moe_jax.types import RouterInputs, TokenChoice

# The thresholds are means of quantiles in whole bins of 1/1024.
BINS = 1024


class ExpertThreshold(nn.Module):
    """The router `expert_threshold`: parameter `kernel` [D, E]; state `thresholds` [E], of the scores, which are sigmoids.

    Every expert whose score is above its threshold runs, with the score as its gate: a token's choice does not depend on other
    tokens of its batch. Up to the `max_k` furthest above run; the rest is counted as `overflow`.
    """

    experts: int
    top_k: int
    options: ExpertThresholdConfig = ExpertThresholdConfig()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice with max_k columns, loss `z`, stats).

        The stats have `overflow`, `unrouted`, the tokens that no expert takes, and the histogram `scores` [E, bins].
        """
        thresholds = self.variable("router_state", "thresholds", jnp.full, (self.experts,), 0.5, jnp.float32).value
        logits, routed, finite = score_by_kernel(self, x, inputs, self.experts)
        scores = jax.nn.sigmoid(logits)
        above = jnp.where(routed[:, None], jax.lax.stop_gradient(scores) - thresholds, -1)
        choice, left = every_positive(above, scores, routed, self.options.max_k)
        shares = scores / jnp.sum(scores, axis=-1, keepdims=True)
        stats = choice_statistics(choice.expert_ids, shares, routed, finite, self.experts)
        stats |= sums(left)
        if inputs.train:
            stats["scores"] = histogram(scores, routed, 0.0, 1.0, BINS)
        return choice, {"z": z_loss(logits, routed)}, stats


def update(state: dict, step: Step, sizes: Sizes, options: ExpertThresholdConfig) -> dict:
    """Thresholds nearer to those that K / E of the step's tokens would have been above."""
    wanted = step.stats["scores"].quantile(1 - sizes.top_k / sizes.experts)
    return {"thresholds": running_mean(state["thresholds"], wanted, step.number, options.decay)}


ROUTER = Router(
    build=lambda sizes, options: ExpertThreshold(sizes.experts, sizes.top_k, options, parent=None),
    loss_weights=lambda options: {"z": options.z_loss},
    update=update,
)
