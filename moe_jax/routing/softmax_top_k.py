"""Softmax over the experts, the K best per token: Switch (K = 1) and the general top-k."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.routing.losses import balance_loss, z_loss
from moe_jax.routing.statistics import choice_statistics
from moe_jax.types import RouterInputs, TokenChoice

LOAD_DECAY = 0.99


def choose(logits: jax.Array, top_k: int, bias: jax.Array | None = None) -> tuple[TokenChoice, jax.Array]:
    """The K most probable experts of each token.

    K = 1 keeps the raw probability as the gate, else the router would get no gradient; K >= 2 renormalises
    the K probabilities to sum to 1. `bias` moves the choice only, never the gates.

    Args:
      logits: [T, E], float32 at least.
      top_k: K.
      bias: [E] or None.

    Returns:
      TokenChoice and the probabilities [T, E].
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    scores = probabilities if bias is None else probabilities + bias
    _, ids = jax.lax.top_k(jax.lax.stop_gradient(scores), top_k)
    gates = jnp.take_along_axis(probabilities, ids, axis=-1)
    if top_k > 1:
        gates = gates / jnp.maximum(jnp.sum(gates, axis=-1, keepdims=True), jnp.finfo(gates.dtype).tiny)
    return TokenChoice(ids.astype(jnp.int32), gates), probabilities


class SoftmaxTopK(nn.Module):
    """The router `softmax_top_k`: parameter `kernel` [D, E]; state `load` [E] and, if it learns one, `bias`.

    `load` is not needed to route: a model may be applied with its parameters alone.
    """

    experts: int
    top_k: int
    bias_rate: float = 0.0
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice, losses `balance` and `z`, stats). Maths in float32 at least."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        init = nn.with_logical_partitioning(init, ("embed", None))
        kernel = self.param("kernel", init, (x.shape[-1], self.experts), self.param_dtype)
        if self.is_initializing():
            self.variable("router_state", "load", jnp.full, (self.experts,), 1 / self.experts, jnp.float32)
        bias = None
        if self.bias_rate:
            bias = self.variable("router_state", "bias", jnp.zeros, (self.experts,), jnp.float32).value

        dtype = jnp.promote_types(x.dtype, jnp.float32)
        valid = jnp.ones(x.shape[:1], bool) if inputs.valid is None else inputs.valid
        # Masked before the product too: in the kernel's gradient 0 * NaN would be NaN.
        clean = valid & jnp.all(jnp.isfinite(x), axis=-1)
        x = jnp.where(clean[:, None], x, 0).astype(dtype)
        # By default the product would be of bfloat16 on a TPU, of TF32 on a GPU.
        logits = jnp.dot(x, kernel.astype(dtype), precision=jax.lax.Precision.HIGHEST)
        routed = clean & jnp.all(jnp.isfinite(logits), axis=-1)
        logits = jnp.where(routed[:, None], logits, 0)
        choice, probabilities = choose(logits, self.top_k, bias)
        ids = jnp.where(routed[:, None], choice.expert_ids, self.experts)
        choice = TokenChoice(ids, jnp.where(routed[:, None], choice.gates, 0))
        stats = choice_statistics(ids, probabilities, routed, routed | ~valid)
        losses = {
            "balance": balance_loss(probabilities, stats["counts"], routed),
            "z": z_loss(logits, routed),
        }
        return choice, losses, stats


def update(
    state: dict[str, jax.Array], stats: dict[str, jax.Array], bias_rate: float
) -> dict[str, jax.Array]:
    """The state after one optimizer step, from the statistics summed over it.

    `load` is a running mean of each expert's share. `bias` moves by `bias_rate` towards the experts below the
    mean load (arXiv 2408.15664, algorithm 1), from the counts of the whole step.
    """
    counts = stats["counts"]
    total = jnp.sum(counts)
    share = counts / jnp.maximum(total, 1)
    new = {"load": jnp.where(total > 0, LOAD_DECAY * state["load"] + (1 - LOAD_DECAY) * share, state["load"])}
    if "bias" in state:
        new["bias"] = state["bias"] + bias_rate * jnp.sign(total / counts.shape[0] - counts)
    return new
