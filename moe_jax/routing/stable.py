"""StableMoE: a routing is learned, distilled into a light router over token ids, then frozen (arXiv:2204.08396)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.routers import HashConfig, StableConfig
from moe_jax.ops.hash_table import random_hash_table
from moe_jax.ops.precision import accumulator
from moe_jax.routing import base, hash, switch, top_k
from moe_jax.routing.contract import Router, Sizes, Step, best, needed_token_ids, own_or_given, score_by_kernel, token_choice
from moe_jax.routing.losses import excess_loss, token_nats
from moe_jax.routing.statistics import choice_statistics, sums
from moe_jax.types import Given, RouterInputs, TokenChoice

LIGHT = ("light_embedding", "light_kernel")  # what stage 2 freezes,
WINDOW = "light_window"  # and of a light router with a window this too
KERNEL_INIT = nn.initializers.orthogonal(0.1)


class Affinity(nn.Module):
    """StableMoE's own backbone: parameter `kernel` [D, E], the experts' centroids.

    A token takes the expert of its highest affinity (equation 6), or the given one; the gate is the sigmoid of the affinity to
    the expert that it takes (equations 7 and 14).
    """

    experts: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice with K = 1, loss `balance` (equation 8, by token), stats)."""
        logits, routed, finite = score_by_kernel(self, x, inputs, self.experts, init=KERNEL_INIT)
        taken = own_or_given(inputs.given, best(logits, 1))
        gates = jax.nn.sigmoid(jnp.take_along_axis(logits, taken, axis=-1))
        choice = token_choice(taken, gates, routed, self.experts)
        stats = choice_statistics(choice.expert_ids, jax.nn.softmax(logits, axis=-1), routed, finite, self.experts)
        return choice, {"balance": excess_loss(gates[:, 0], stats["counts"], taken[:, 0], routed)}, stats


AFFINITY = Router(
    build=lambda sizes, options: Affinity(sizes.experts, parent=None),
    loss_weights=lambda options: {"balance": options.balance_loss},
)
BACKBONES = {"affinity": AFFINITY, "base": base.ROUTER, "switch": switch.ROUTER, "top_k": top_k.ROUTER}


class Stable(nn.Module):
    """The router `stable`.

    Parameters: those of the `backbone`, under this name; of the light router `light_embedding` [V, W], `light_kernel` [W, E]
    and with a window of P + 1 ids `light_window` [P + 1], which stage 2 freezes. State: `frozen` bool, whether stage 2 has
    begun; without a window `table` int32 [V], the expert of each token id in stage 2, 0 before; that of the backbone.

    In stage 1 the backbone chooses, in stage 2 the light router as it was left, the gates being those that the backbone gives
    to the experts that are taken, always, so that it learns in stage 2 too. Evaluation in stage 1 takes the light router's
    choice, or by `evaluation` the backbone's. With `light_router="balanced"` there is no stage 1 and no light router: the state
    is a `table` alone, random until `start` balances it.
    """

    experts: int
    vocab_size: int
    backbone: nn.Module
    top_k: int = 1
    options: StableConfig = StableConfig()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice, the backbone's losses and `distillation`, all 0 in stage 2, stats).

        What is distilled is the choice that the backbone makes in evaluation: BASE's, without the auction. The stats have
        `agreement_tokens` too: how many tokens, by their K experts, the light router sends as the backbone would.

        Raises:
          ValueError: `inputs.token_ids` is missing, or with a window `inputs.earlier_ids`.
        """
        token_ids = needed_token_ids(inputs, "the router stable")
        if self.options.light_router == "balanced":
            scores, frozen, light = None, jnp.ones((), bool), self._fixed(token_ids)
        else:
            scores = self._light(token_ids, inputs.earlier_ids, accumulator(x.dtype))
            frozen, light = self._frozen(scores, token_ids)
        by_backbone = inputs.train or self.options.evaluation == "backbone"
        given = Given(light, frozen if by_backbone else jnp.ones((), bool))
        choice, losses, stats = self.backbone(x, inputs._replace(given=given))
        target = self.backbone(x, inputs._replace(train=False, key=None))[0].expert_ids
        routed = target[:, 0] < self.experts
        target = jnp.where(routed[:, None], target, 0)
        agreeing = jnp.mean(jnp.any(light[:, :, None] == target[:, None], axis=-1), axis=-1)
        if scores is not None:
            nats = sum(token_nats(scores, target[:, k], routed) for k in range(self.top_k)) / self.top_k
            losses = {**losses, "distillation": nats}
        losses = {name: jnp.where(frozen, 0, loss) for name, loss in losses.items()}
        return choice, losses, stats | sums({"agreement_tokens": jnp.sum(jnp.where(routed, agreeing, 0))})

    def _light(self, token_ids, earlier_ids, dtype):
        """[T, E] scores of the light router (equation 9)."""
        whole = lambda init: nn.with_logical_partitioning(init, (None, None))
        width, earlier = self.options.light_width, self.options.earlier_tokens
        embedding = self.param(
            "light_embedding", whole(nn.initializers.normal(1.0)), (self.vocab_size, width), self.param_dtype
        )
        kernel = self.param("light_kernel", whole(KERNEL_INIT), (width, self.experts), self.param_dtype)
        words = embedding[token_ids]
        if earlier:
            if earlier_ids is None or earlier_ids.shape[1] < earlier:
                raise ValueError(f"the router stable needs the {earlier} earlier_ids of each token in its RouterInputs")
            init = nn.with_logical_partitioning(_uniform((earlier + 1) ** -0.5), (None,))
            weights = self.param(WINDOW, init, (earlier + 1,), self.param_dtype)
            ids = earlier_ids[:, :earlier]
            before = jnp.where(ids[..., None] >= 0, embedding[jnp.maximum(ids, 0)], 0)
            words = weights[0] * words + jnp.sum(weights[1:, None] * before, axis=1)
        return light_scores(words, kernel, dtype)

    def _frozen(self, scores, token_ids):
        """Whether stage 2 has begun, and the K experts of the light router, or of its table, for each token."""
        frozen = self.variable("router_state", "frozen", jnp.zeros, (), bool).value
        light = best(scores, self.top_k)
        if self.options.earlier_tokens:
            return frozen, light
        shape = (self.vocab_size,) if self.top_k == 1 else (self.vocab_size, self.top_k)
        table = self.variable("router_state", "table", jnp.zeros, shape, jnp.int32).value
        return frozen, jnp.where(frozen, table[token_ids].reshape(light.shape), light)

    def _fixed(self, token_ids):
        """[T, 1] experts of a table that nobody learns."""
        random = lambda: jnp.asarray(random_hash_table(self.vocab_size, self.experts, 0))
        return self.variable("router_state", "table", random).value[token_ids][:, None]


def _uniform(limit):
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)


def light_scores(words: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """[N, E] scores of word vectors [N, W] by a kernel [W, E], in `dtype`."""
    return jnp.dot(words.astype(dtype), kernel.astype(dtype), precision=jax.lax.Precision.HIGHEST)


def _update(state: dict, step: Step, sizes: Sizes, options: StableConfig) -> dict:
    """Stage 2 begins after the last step of stage 1, with the light router as that step left it."""
    backbone, last = BACKBONES[options.backbone], options.stage_1_steps(step.steps)
    if backbone.update is not None:
        own = step._replace(params=step.params["backbone"])
        state = state | {"backbone": backbone.update(state["backbone"], own, sizes, options.of_backbone)}
    if last is None or options.light_router == "balanced":
        return state
    light = {name: step.params[name] for name in LIGHT}

    def settle(light):
        after = {"frozen": jnp.ones_like(state["frozen"])}
        if "table" in state:
            dtype = accumulator(light["light_kernel"].dtype)
            taken = best(light_scores(light["light_embedding"], light["light_kernel"], dtype), sizes.top_k)
            after["table"] = jnp.where(state["frozen"], state["table"], taken.reshape(state["table"].shape))
        return state | after

    # A run that is resumed with fewer steps may have passed the last one of stage 1. All blocks of a stack change in one step,
    # so that this stays a branch under vmap.
    return jax.lax.cond(step.number >= last, settle, lambda light: state, light)


def _start(state: dict, token_shares: Callable[[], np.ndarray], sizes: Sizes, options: StableConfig) -> dict:
    """The state with a table that is balanced over the training text, where there is no light router."""
    if options.light_router != "balanced":
        return state
    return state | hash.start({}, token_shares, sizes, HashConfig())


def _build(sizes: Sizes, options: StableConfig) -> Stable:
    backbone = BACKBONES[options.backbone].build(sizes, options.of_backbone)
    return Stable(sizes.experts, sizes.vocab_size, backbone, sizes.top_k, options, parent=None)


def _loss_weights(options: StableConfig) -> dict[str, float]:
    weights = BACKBONES[options.backbone].loss_weights(options.of_backbone)
    return weights if options.light_router == "balanced" else weights | {"distillation": options.distillation_loss}


def _frozen_leaves(state: dict) -> dict[str, jax.Array]:
    if "frozen" not in state:  # there is no light router
        return {}
    return {name: state["frozen"] for name in (*LIGHT, *(() if "table" in state else (WINDOW,)))}


ROUTER = Router(
    build=_build,
    loss_weights=_loss_weights,
    update=_update,
    frozen=_frozen_leaves,
    start=_start,
    by_token=True,
)
