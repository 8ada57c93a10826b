"""What routers learn outside the gradient: before the first step from the data, after each step from its statistics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import MoEConfig
from moe_jax.layers.block import router_sizes
from moe_jax.routing import ROUTERS, product_keys


def update_router_state(router_state: Any, stats: Any, config: MoEConfig) -> Any:
    """The routers' state after a step, from the statistics summed over it; see `Router.update`, and of layers that retrieve
    `product_keys.update`."""
    router, sizes = ROUTERS[config.router], router_sizes(config)
    if not router_state:
        return router_state
    layers = [layer for layer in _layers(stats) if "counts" in layer]
    total = jax.tree.map(lambda *parts: sum(parts), *map(_over_groups, layers)) if layers else {}

    def walk(state, sums):
        if not _of_layer(sums):
            return {name: walk(state[name], sums[name]) if name in sums else state[name] for name in state}
        if "peer" in state:
            return {"peer": {"router": product_keys.update(state["peer"]["router"], sums)}}
        if router.update is None:
            return state

        def one(state, sums):
            return router.update(state, sums, total, sizes, config.options)

        stacked = sums["counts"].ndim == 2
        return {"moe": {"router": (jax.vmap(one) if stacked else one)(state["moe"]["router"], sums)}}

    return {"stack": walk(router_state["stack"], stats)}


def _of_layer(sums: dict[str, Any]) -> bool:
    return "tokens" in sums


def _layers(stats: dict[str, Any]) -> list[dict[str, jax.Array]]:
    if not stats or _of_layer(stats):
        return [stats] if stats else []
    return [layer for inner in stats.values() for layer in _layers(inner)]


def _over_groups(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda a: jnp.sum(a, axis=0), sums) if sums["counts"].ndim == 2 else sums


def start_router_state(router_state: Any, token_shares: Callable[[], np.ndarray], config: MoEConfig, vocab_size: int) -> Any:
    """The routers' state before the first step, on the devices of `router_state`; see `Router.start`.

    token_shares: gives float64 [V], the share of each id in the training text; called only where a router asks.
    """
    router, sizes = ROUTERS[config.router], router_sizes(config, vocab_size)
    if router.start is None or not router_state:
        return router_state
    shares = token_shares()

    def walk(tree, stacked):
        if "peer" in tree:
            return tree
        if "moe" not in tree:
            return {name: walk(inner, stacked or name == "groups") for name, inner in tree.items()}
        old = tree["moe"]["router"]
        host = jax.device_get(old)
        groups = len(next(iter(host.values()))) if stacked else 1
        parts = [jax.tree.map(lambda a: a[g], host) if stacked else host for g in range(groups)]
        parts = [router.start(part, shares, sizes, config.options) for part in parts]
        new = jax.tree.map(lambda *a: np.stack(a), *parts) if stacked else parts[0]
        new = jax.tree.map(lambda a, b: jax.device_put(np.asarray(a, b.dtype), b.sharding), new, old)
        return {"moe": {"router": new}}

    return {"stack": walk(router_state["stack"], False)}
