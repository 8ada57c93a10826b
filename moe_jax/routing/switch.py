"""Switch Transformer: the most probable expert alone (arXiv:2101.03961)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config.routers import SwitchConfig
from moe_jax.routing.contract import Router, best, own_or_given, score_by_kernel, token_choice
from moe_jax.routing.losses import balance_loss, z_loss
from moe_jax.routing.statistics import choice_statistics, column_counts
from moe_jax.types import RouterInputs, TokenChoice


class Switch(nn.Module):
    """The router `switch`: parameter `kernel` [D, E+V].

    The gate is the raw probability: divided by itself it would be 1, and the router without a gradient.
    """

    experts: int
    virtual: int = 0
    options: SwitchConfig = SwitchConfig()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice with K = 1, losses `balance` and `z`, stats). Maths in float32 at least."""
        logits, routed, finite = score_by_kernel(self, x, inputs, self.experts + self.virtual, jitter=self.options.jitter)
        probabilities = jax.nn.softmax(logits, axis=-1)
        ids = own_or_given(inputs.given, best(probabilities, 1))
        gates = jnp.take_along_axis(probabilities, ids, axis=-1)
        choice = token_choice(ids, gates, routed, self.experts)
        stats = choice_statistics(choice.expert_ids, probabilities, routed, finite, self.experts)
        losses = {
            "balance": balance_loss(probabilities, column_counts(stats), routed),
            "z": z_loss(logits, routed),
        }
        return choice, losses, stats


ROUTER = Router(
    build=lambda sizes, options: Switch(sizes.experts, sizes.virtual, options, parent=None),
    loss_weights=lambda options: {"balance": options.balance_loss, "z": options.z_loss},
)
