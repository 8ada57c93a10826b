"""GShard top-2, whose second expert does not always run (arXiv:2006.16668, section 2.2 and algorithm 1)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config.routers import GShardConfig
from moe_jax.ops.counting import count_experts
from moe_jax.routing.contract import Router, best, score_by_kernel, token_choice
from moe_jax.routing.losses import balance_loss, z_loss
from moe_jax.routing.statistics import choice_statistics
from moe_jax.types import RouterInputs, TokenChoice


def keep_second(gate: jax.Array, policy: str, threshold: float, key: jax.Array | None) -> jax.Array:
    """Whether the second expert runs, bool [T].

    Args:
      gate: [T], of the second expert, after the pair was divided by its sum.
      policy: "all"; "threshold": gate > threshold; "random": with probability min(1, gate / threshold), which for the
        paper's 2 * gate is a threshold of 0.5.
      threshold: see `policy`.
      key: of the random draw; None: the second expert always runs.
    """
    if policy == "threshold":
        return gate > threshold
    if policy == "random" and key is not None:
        return gate > threshold * jax.random.uniform(key, gate.shape, gate.dtype)
    return jnp.ones(gate.shape, bool)


class GShard(nn.Module):
    """The router `gshard`: parameter `kernel` [D, E+V].

    The gates are the two probabilities divided by their sum, and stay so where the second expert is not kept.
    """

    experts: int
    virtual: int = 0
    options: GShardConfig = GShardConfig()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice with K = 2, losses `balance`, of the first choices, and `z`, stats)."""
        o, columns = self.options, self.experts + self.virtual
        logits, routed, finite = score_by_kernel(self, x, inputs, columns)
        probabilities = jax.nn.softmax(logits, axis=-1)
        ids = best(probabilities, 2)
        gates = jnp.take_along_axis(probabilities, ids, axis=-1)
        gates = gates / jnp.maximum(jnp.sum(gates, axis=-1, keepdims=True), jnp.finfo(gates.dtype).tiny)
        policy = o.second_expert if inputs.train else o.eval_second_expert
        kept = keep_second(gates[:, 1], policy, o.threshold, inputs.key if inputs.train else None)
        choice = token_choice(ids, gates, jnp.stack([routed, routed & kept], axis=1), self.experts)
        stats = choice_statistics(choice.expert_ids, probabilities, routed, finite, self.experts)
        first = count_experts(jnp.where(routed, ids[:, 0], columns), columns)
        losses = {"balance": balance_loss(probabilities, first, routed), "z": z_loss(logits, routed)}
        return choice, losses, stats


ROUTER = Router(
    build=lambda sizes, options: GShard(sizes.experts, sizes.virtual, options, parent=None),
    loss_weights=lambda options: {"balance": options.balance_loss, "z": options.z_loss},
)
