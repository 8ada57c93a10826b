"""Expert choice: every expert takes its C best tokens, so that all are equally loaded (arXiv:2202.09368)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config.routers import ExpertChoiceConfig
from moe_jax.ops.counting import slots_per_expert
from moe_jax.routing.contract import Router, best, score_by_kernel, token_choice
from moe_jax.routing.losses import z_loss
from moe_jax.routing.statistics import choice_statistics, sums, token_statistics
from moe_jax.types import ExpertChoice, RouterInputs, TokenChoice


class ExpertChoiceRouter(nn.Module):
    """The router `expert_choice`: parameter `kernel` [D, E].

    An expert takes C = ceil(T K / E) tokens of the whole microbatch, in training and in evaluation; T counts the valid ones.
    Whether a token is taken depends on all others, later ones too. Tokens that no expert takes are counted as
    `unrouted`. With `options.evaluation` "tokens" every token takes its K best experts in evaluation, by the same
    scores and with the same gates.
    """

    experts: int
    top_k: int
    options: ExpertChoiceConfig = ExpertChoiceConfig()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[ExpertChoice | TokenChoice, dict, dict]:
        """x [T, D] -> (assignment, losses `z`, stats). Maths in float32 at least."""
        logits, routed, finite = score_by_kernel(self, x, inputs, self.experts)
        probabilities = jax.nn.softmax(logits, axis=-1)
        losses = {"z": z_loss(logits, routed)}
        if self.options.evaluation == "tokens" and not inputs.train:
            ids = best(probabilities, self.top_k)
            choice = token_choice(ids, jnp.take_along_axis(probabilities, ids, axis=-1), routed, self.experts)
            stats = choice_statistics(choice.expert_ids, probabilities, routed, finite, self.experts)
            return choice, losses, stats | {"unrouted": jnp.zeros((), jnp.float32)}
        tokens = x.shape[0]
        capacity = slots_per_expert(1.0, tokens, self.top_k, self.experts)
        ranked = jnp.where(routed[:, None], jax.lax.stop_gradient(probabilities), -1).T
        score, ids = jax.lax.top_k(ranked, capacity)
        wanted = jnp.ceil(jnp.sum(routed) * self.top_k / self.experts)  # the slots are static, padding takes none
        taken = (score >= 0) & (jnp.arange(capacity) < wanted)
        gates = jnp.where(taken, jnp.take_along_axis(probabilities.T, ids, axis=1), 0)
        ids = jnp.where(taken, ids, tokens).astype(jnp.int32)
        experts = jnp.zeros(tokens, jnp.int32).at[ids.reshape(-1)].add(1, mode="drop")
        stats = sums(
            {
                "counts": jnp.sum(taken, axis=1),
                "unrouted": jnp.sum(routed & (experts == 0)),
                **token_statistics(probabilities, routed, finite),
            }
        )
        return ExpertChoice(ids, gates), losses, stats


ROUTER = Router(
    build=lambda sizes, options: ExpertChoiceRouter(sizes.experts, sizes.top_k, options, parent=None),
    loss_weights=lambda options: {"z": options.z_loss},
)
