"""The K best experts of a token by score: Mixtral, OLMoE, DeepSeek-V3 and Qwen-MoE are settings of it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config.routers import TopKConfig
from moe_jax.ops.counting import one_hot_sum
from moe_jax.routing.contract import Router, Sizes, Step, best, own_or_given, score_by_kernel, token_choice
from moe_jax.routing.losses import balance_loss, sequence_balance_loss, z_loss
from moe_jax.routing.statistics import choice_statistics, column_counts, histogram
from moe_jax.types import Given, RouterInputs, TokenChoice

LOAD_DECAY = 0.99
# The quantiles of `bias_rule="quantile"` are whole bins of 1/1024.
MARGIN_BINS = 2048
SCORES = {
    "softmax": lambda logits: jax.nn.softmax(logits, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    # The root of what underflows to 0 would have an infinite gradient.
    "sqrt_softplus": lambda logits: jnp.sqrt(jnp.maximum(jax.nn.softplus(logits), jnp.finfo(logits.dtype).tiny)),
}


def choose(
    logits: jax.Array, top_k: int, options: TopKConfig, bias: jax.Array | None = None, given: Given | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The K best experts of each token.

    With groups, a group counts as the sum of its two best scores, and experts outside the `kept_groups` best groups are
    out (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). `bias` moves the choice only, never the gates (arXiv:2408.15664).

    Args:
      logits: [T, N], float32 at least.
      top_k: K.
      options: how to score and choose; its losses and rates are not used.
      bias: [N] or None.
      given: what another router may have chosen instead.

    Returns:
      int32 [T, K] columns, best first; gates [T, K]; scores [T, N] divided by their sum, for losses.
    """
    scores = SCORES[options.score](logits)
    ranked = scores if bias is None else scores + bias
    if options.groups > 1:
        ranked = _limit_groups(ranked, options.groups, options.kept_groups)
    ids = own_or_given(given, best(ranked, top_k))
    if options.order == "top_k_first":
        gates = jax.nn.softmax(jnp.take_along_axis(logits, ids, axis=-1), axis=-1)
    else:
        gates = jnp.take_along_axis(scores, ids, axis=-1)
    if options.renormalise == "always" or (options.renormalise == "auto" and top_k > 1):
        gates = _shares(gates)
    probabilities = scores if options.score == "softmax" else _shares(scores)
    return ids, gates * options.scale if options.scale != 1 else gates, probabilities


def _shares(a: jax.Array) -> jax.Array:
    # The gradient divides by the square, which must not underflow.
    return a / jnp.maximum(jnp.sum(a, axis=-1, keepdims=True), jnp.finfo(a.dtype).tiny ** 0.5)


def _limit_groups(scores: jax.Array, groups: int, kept: int) -> jax.Array:
    grouped = scores.reshape(scores.shape[0], groups, -1)
    value = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[2]))[0], axis=-1)
    out = one_hot_sum(best(value, kept), groups) == 0
    # Not 0: with a bias a score may be below that.
    return jnp.where(out[..., None], -jnp.inf, grouped).reshape(scores.shape)


def margins(scores: jax.Array, bias: jax.Array, top_k: int) -> jax.Array:
    """[T, N]: how far each score [T, N] is above its token's (K+1)-th highest score + bias, which a chosen expert beats.

    An expert is chosen where its margin is above minus its bias [N].
    """
    return scores - jax.lax.top_k(scores + bias, top_k + 1)[0][:, -1:]


class TopK(nn.Module):
    """The router `top_k`: parameter `kernel` [D, E+V]; state `load` [E+V] and, if it learns one, `bias` [E+V].

    `load` is not needed to route: a model may be applied with its parameters alone.
    """

    experts: int
    top_k: int
    virtual: int = 0
    options: TopKConfig = TopKConfig()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice, losses `balance`, `sequence` and `z`, stats). Maths in float32 at least."""
        columns = self.experts + self.virtual
        if self.is_initializing():
            self.variable("router_state", "load", jnp.full, (columns,), 1 / columns, jnp.float32)
        bias = None
        if self.options.bias_rate:
            bias = self.variable("router_state", "bias", jnp.zeros, (columns,), jnp.float32).value

        logits, routed, finite = score_by_kernel(self, x, inputs, columns, jitter=self.options.jitter)
        ids, gates, probabilities = choose(logits, self.top_k, self.options, bias, inputs.given)
        choice = token_choice(ids, gates, routed, self.experts)
        stats = choice_statistics(choice.expert_ids, probabilities, routed, finite, self.experts)
        losses = {
            "balance": balance_loss(probabilities, column_counts(stats), routed),
            "z": z_loss(logits, routed),
        }
        if self.options.bias_rate and self.options.bias_rule == "quantile" and inputs.train:
            above = margins(SCORES[self.options.score](logits), bias, self.top_k)
            stats["margins"] = histogram(above, routed, -1.0, 1.0, MARGIN_BINS)
        if self.options.sequence_loss:
            chosen = one_hot_sum(ids, columns)
            losses["sequence"] = sequence_balance_loss(probabilities, chosen, routed, inputs.sequences)
        return choice, losses, stats


def loss_weights(options: TopKConfig) -> dict[str, float]:
    """The weight of each loss of `TopK`."""
    weights = {"balance": options.balance_loss, "z": options.z_loss}
    return weights | ({"sequence": options.sequence_loss} if options.sequence_loss else {})


def update(state: dict[str, jax.Array], step: Step, sizes: Sizes, options: TopKConfig) -> dict[str, jax.Array]:
    """The state after one optimizer step, from the statistics summed over it.

    `load` is a running mean of each expert's share. `bias` moves by `bias_rate` towards the experts below the
    mean load (arXiv 2408.15664, algorithm 1), from the counts of the whole step. By the rule "quantile" it moves by the share
    `bias_rate` of the way to where the T K / N best margins of each expert would have been chosen: a round of the dual
    coordinate descent on the balanced assignment. Its mean, which changes no choice, stays 0.
    """
    counts = column_counts(step.stats)
    assignments = jnp.sum(counts)
    share = counts / jnp.maximum(assignments, 1)
    new = {"load": jnp.where(assignments > 0, LOAD_DECAY * state["load"] + (1 - LOAD_DECAY) * share, state["load"])}
    if "bias" in state:
        if by_quantile := options.bias_rule == "quantile":
            wanted = -step.stats["margins"].quantile(1 - sizes.top_k / counts.shape[0])
            bias = state["bias"] + options.bias_rate * (wanted.astype(state["bias"].dtype) - state["bias"])
        else:
            bias = state["bias"] + options.bias_rate * jnp.sign(assignments / counts.shape[0] - counts)
        new["bias"] = bias - jnp.mean(bias) if options.zero_sum_bias or by_quantile else bias
    return new


ROUTER = Router(
    build=lambda sizes, options: TopK(sizes.experts, sizes.top_k, sizes.virtual, options, parent=None),
    loss_weights=loss_weights,
    update=update,
)
