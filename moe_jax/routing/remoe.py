"""ReMoE: differentiable routing by ReLU gates; a controller keeps K experts a token on average (arXiv:2412.14711)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config.routers import ReMoEConfig
from moe_jax.routing.contract import Router, Sizes, Step, every_positive, score_by_kernel
from moe_jax.routing.losses import z_loss
from moe_jax.routing.statistics import choice_statistics, sums
from moe_jax.types import RouterInputs, TokenChoice

# The range of the controller's weight: no factor leads back from 0, and infinity times 0 is NaN.
WEIGHTS = (1e-20, 1e6)


def sparsity_loss(gates: jax.Array, counts: jax.Array, top_k: int, valid: jax.Array) -> jax.Array:
    """Mean over valid tokens of sum_e f_e R_e with f_e = E / (K T) * counts_e, without a gradient (equation 9).

    Args:
      gates: [T, E], R.
      counts: [E], tokens with a gate above 0.
      top_k: K.
      valid: bool [T].
    """
    tokens = jnp.maximum(jnp.sum(valid), 1)
    f = jax.lax.stop_gradient(counts).astype(gates.dtype) * gates.shape[1] / (top_k * tokens)
    return jnp.sum(jnp.where(valid[:, None], gates, 0) * f) / tokens


class ReMoE(nn.Module):
    """The router `remoe`: parameter `kernel` [D, E]; state `weight`, of the sparsity loss.

    Every expert whose gate relu(x kernel) is above 0 runs, up to the `max_k` highest; the rest is counted as `overflow`.
    """

    experts: int
    top_k: int
    options: ReMoEConfig = ReMoEConfig()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice with max_k columns, losses `sparsity`, times its weight, and `z`, stats)."""
        weight = self.variable("router_state", "weight", jnp.full, (), self.options.start_weight, jnp.float32)
        logits, routed, finite = score_by_kernel(self, x, inputs, self.experts)
        gates = jnp.where(routed[:, None], jax.nn.relu(logits), 0)
        choice, left = every_positive(gates, gates, routed, self.options.max_k)
        shares = gates / jnp.maximum(jnp.sum(gates, axis=-1, keepdims=True), jnp.finfo(gates.dtype).tiny)
        stats = choice_statistics(choice.expert_ids, shares, routed, finite, self.experts)
        active = jnp.sum(gates > 0, axis=0)
        stats |= sums(left)
        losses = {
            "sparsity": weight.value * sparsity_loss(gates, active, self.top_k, routed),
            "z": z_loss(logits, routed),
        }
        return choice, losses, stats


def update(state: dict, step: Step, sizes: Sizes, options: ReMoEConfig) -> dict:
    """The weight, times `rate` where more than K experts per token ran on average over the model, else divided (equation 8)."""
    wanted = sizes.top_k * step.total["tokens"]
    active = jnp.sum(step.total["counts"]) + step.total["overflow"]
    weight = state["weight"] * options.rate ** jnp.sign(active - wanted)
    return {"weight": jnp.clip(weight, *WEIGHTS)}


ROUTER = Router(
    build=lambda sizes, options: ReMoE(sizes.experts, sizes.top_k, options, parent=None),
    loss_weights=lambda options: {"sparsity": 1.0, "z": options.z_loss},
    update=update,
)
