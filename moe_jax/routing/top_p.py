"""Top-p routing: as many experts as it takes for their probabilities to sum to p (arXiv:2403.07652)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config.routers import TopPConfig
from moe_jax.routing.contract import Router, best, score_by_kernel, token_choice
from moe_jax.routing.losses import balance_loss, entropy_loss, z_loss
from moe_jax.routing.statistics import choice_statistics, column_counts, sums
from moe_jax.types import RouterInputs, TokenChoice


def keep_until(probabilities: jax.Array, p: float) -> jax.Array:
    """bool [T, K]: whether the experts before each one sum to less than p (equation 4).

    Args:
      probabilities: [T, K], best first.
      p: above 0, so that the first is always kept.
    """
    return jnp.cumsum(probabilities, axis=-1) - probabilities < p


class TopP(nn.Module):
    """The router `top_p`: parameter `kernel` [D, E+V]. The gates are the raw probabilities."""

    experts: int
    virtual: int = 0
    options: TopPConfig = TopPConfig()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice with max_k columns, losses `balance`, `entropy` (equation 6) and `z`, stats).

        The stats have `overflow`, the experts that were left out for max_k.
        """
        o, columns = self.options, self.experts + self.virtual
        logits, routed, finite = score_by_kernel(self, x, inputs, columns)
        probabilities = jax.nn.softmax(logits, axis=-1)
        ids = best(probabilities, columns)
        gates = jnp.take_along_axis(probabilities, ids, axis=-1)
        wanted = keep_until(jax.lax.stop_gradient(gates), o.p)
        kept = wanted[:, : o.max_k or columns]
        choice = token_choice(ids[:, : kept.shape[1]], gates[:, : kept.shape[1]], routed[:, None] & kept, self.experts)
        stats = choice_statistics(choice.expert_ids, probabilities, routed, finite, self.experts)
        stats |= sums({"overflow": jnp.sum(jnp.where(routed[:, None], wanted[:, kept.shape[1] :], False))})
        losses = {
            "balance": balance_loss(probabilities, column_counts(stats), routed),
            "entropy": entropy_loss(probabilities, routed),
            "z": z_loss(logits, routed),
        }
        return choice, losses, stats


ROUTER = Router(
    build=lambda sizes, options: TopP(sizes.experts, sizes.virtual, options, parent=None),
    loss_weights=lambda options: {"balance": options.balance_loss, "entropy": options.entropy_loss, "z": options.z_loss},
)
