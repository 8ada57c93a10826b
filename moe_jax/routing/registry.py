"""Name -> router. A new router is one file, one row here and its options field in the config."""

from typing import Any, Callable, NamedTuple

import flax.linen as nn

from moe_jax.routing import softmax_top_k


class Router(NamedTuple):
    """What the rest of the code needs to know of a router.

    build(experts, top_k, options): the Linen module, without a parent; called with (x [T, D], RouterInputs),
      it returns (assignment, losses, stats).
    loss_weights(options): the weight of each loss that the module returns.
    update(state, stats, options): the `router_state` after one optimizer step; None for a router without one.
    causal: whether a token's assignment never depends on later tokens.
    """

    build: Callable[[int, int, Any], nn.Module]
    loss_weights: Callable[[Any], dict[str, float]]
    update: Callable[[dict, dict, Any], dict] | None
    causal: bool


ROUTERS: dict[str, Router] = {
    "softmax_top_k": Router(
        build=lambda experts, top_k, options: softmax_top_k.SoftmaxTopK(
            experts, top_k, options.bias_rate, parent=None
        ),
        loss_weights=lambda options: {"balance": options.balance_loss, "z": options.z_loss},
        update=lambda state, stats, options: softmax_top_k.update(state, stats, options.bias_rate),
        causal=True,
    ),
}
