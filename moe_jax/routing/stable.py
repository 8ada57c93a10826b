"""StableMoE: a balanced routing is learned, distilled into a light router over token ids, then frozen (arXiv:2204.08396)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config.routers import StableConfig
from moe_jax.ops.precision import accumulator
from moe_jax.routing.contract import Router, Sizes, Step, best, needed_token_ids, score_by_kernel, token_choice
from moe_jax.routing.losses import excess_loss, token_nats
from moe_jax.routing.statistics import choice_statistics, sums
from moe_jax.types import RouterInputs, TokenChoice

LIGHT = ("light_embedding", "light_kernel")  # what stage 2 freezes
KERNEL_INIT = nn.initializers.orthogonal(0.1)


class Stable(nn.Module):
    """The router `stable`.

    Parameters: `kernel` [D, E], the experts' centroids; of the light router `light_embedding` [V, W] and `light_kernel`
    [W, E], which stage 2 freezes. State: `frozen` bool, whether stage 2 has begun; `table` int32 [V], the expert of each
    token id in stage 2, 0 before.

    In stage 1 a token takes the expert of its highest affinity (equation 6), in stage 2 that of the table (equation 13);
    evaluation in stage 1 takes the light router's, or by `evaluation` the highest affinity. The gate is the sigmoid of the
    affinity to the expert that was taken, always (equations 7 and 14), so that the centroids learn in stage 2 too.
    """

    experts: int
    vocab_size: int
    options: StableConfig = StableConfig()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice with K = 1, losses `balance` and `distillation`, both 0 in stage 2, stats).

        The stats have `agreement_tokens` too: how many tokens the light router, or the table, and the affinities send alike.

        Raises:
          ValueError: `inputs.token_ids` is missing.
        """
        token_ids = needed_token_ids(inputs, "the router stable")
        logits, routed, finite = score_by_kernel(self, x, inputs, self.experts, init=KERNEL_INIT)
        nearest, light_logits = best(logits, 1), self._light(token_ids, accumulator(x.dtype))
        frozen = self.variable("router_state", "frozen", jnp.zeros, (), bool).value
        table = self.variable("router_state", "table", jnp.zeros, self.vocab_size, jnp.int32).value
        light = jnp.where(frozen, table[token_ids][:, None], best(light_logits, 1))

        by_affinity = inputs.train or self.options.evaluation == "backbone"
        taken = jnp.where(frozen, light, nearest) if by_affinity else light
        gates = jax.nn.sigmoid(jnp.take_along_axis(logits, taken, axis=-1))
        choice = token_choice(taken, gates, routed, self.experts)
        stats = choice_statistics(choice.expert_ids, jax.nn.softmax(logits, axis=-1), routed, finite, self.experts)
        agreeing = jnp.sum((light == nearest)[:, 0] & routed)

        losses = {
            "balance": excess_loss(gates[:, 0], stats["counts"], taken[:, 0], routed),
            "distillation": token_nats(light_logits, nearest[:, 0], routed),
        }
        losses = {name: jnp.where(frozen, 0, loss) for name, loss in losses.items()}
        return choice, losses, stats | sums({"agreement_tokens": agreeing})

    def _light(self, token_ids, dtype):
        """[T, E] scores of the light router (equation 9)."""
        whole = lambda init: nn.with_logical_partitioning(init, (None, None))
        width = self.options.light_width
        embedding = self.param(
            "light_embedding", whole(nn.initializers.normal(1.0)), (self.vocab_size, width), self.param_dtype
        )
        kernel = self.param("light_kernel", whole(KERNEL_INIT), (width, self.experts), self.param_dtype)
        return light_scores(embedding[token_ids], kernel, dtype)


def light_scores(embedding: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """[N, E] scores of word vectors [N, W] by a kernel [W, E], in `dtype`."""
    return jnp.dot(embedding.astype(dtype), kernel.astype(dtype), precision=jax.lax.Precision.HIGHEST)


def _update(state: dict, step: Step, sizes: Sizes, options: StableConfig) -> dict:
    """Stage 2 begins after the last step of stage 1, with the light router as that step left it."""
    last = options.stage_1_steps(step.steps)
    if last is None:
        return state
    light = {name: step.params[name] for name in LIGHT}

    def settle(light):
        scores = light_scores(light["light_embedding"], light["light_kernel"], accumulator(light["light_kernel"].dtype))
        return {
            "frozen": jnp.ones_like(state["frozen"]),
            "table": jnp.where(state["frozen"], state["table"], best(scores, 1)[:, 0]),
        }

    # A run that is resumed with fewer steps may have passed the last one of stage 1. All blocks of a stack change in one step,
    # so that this stays a branch under vmap.
    return jax.lax.cond(step.number >= last, settle, lambda light: state, light)


ROUTER = Router(
    build=lambda sizes, options: Stable(sizes.experts, sizes.vocab_size, options, parent=None),
    loss_weights=lambda options: {"balance": options.balance_loss, "distillation": options.distillation_loss},
    update=_update,
    frozen=lambda state: {name: state["frozen"] for name in LIGHT},
    by_token=True,
)
