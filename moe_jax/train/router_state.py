"""What routers learn without a gradient: from the data before the first step, and from the statistics of each step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moe_jax.config import Config, FFNConfig, ModelConfig
from moe_jax.config.blocks import RETRIEVING
from moe_jax.layers.block import router_of, router_sizes
from moe_jax.models.places import Place, stacked_places
from moe_jax.routing import ROUTERS, Step


def update_router_state(router_state: Any, stats: Any, params: Any, applied: jax.Array, config: Config) -> Any:
    """The routers' state after a step, see `Router.update`.

    Args:
      router_state: before it.
      stats: the statistics summed over it, at the places of the blocks.
      params: the model's parameters after it.
      applied: int32 scalar, how many steps were applied so far, this one included; skipped ones do not count.
      config: the run's.
    """
    state = router_state.get("stack", {})
    blocks = sorted(stacked_places(config.model, "routed", *RETRIEVING), key=lambda place: place.path)
    totals = _totals(blocks, stats)
    new = state
    for place in blocks:
        old = _router(place, state)
        if not old:
            continue
        sums, router_params = place.find(stats), _router(place, params.get("stack", {}))
        update = _update_of(place.ffn, totals[place.ffn.name], applied, config.train.steps)
        if update is not None:
            made = (update if place.group is None else jax.vmap(update))(old, sums, router_params or {})
            new = _replaced(new, (*place.path, place.module, "router"), made)
    return router_state if new is state else {"stack": new}


def _update_of(ffn: FFNConfig, total: Any, applied: jax.Array, steps: int):
    """(state, stats, params) of one block -> its new state; None: the router keeps it."""
    router, sizes, options = router_of(ffn)
    if router.update is None:
        return None
    return lambda state, stats, params: router.update(state, Step(stats, total, params, applied, steps), sizes, options)


def _totals(blocks: list[Place], stats: Any) -> dict[str, Any]:
    """The statistics summed over the blocks of each layer with a router, by its name."""
    totals: dict[str, Any] = {}
    for place in blocks:
        if sums := place.find(stats):
            over_groups = sums if place.group is None else jax.tree.map(lambda a: a.sum(axis=0), sums)
            name = place.ffn.name
            totals[name] = jax.tree.map(lambda a, b: a + b, totals[name], over_groups) if name in totals else over_groups
    return totals


def _router(place: Place, tree: Any) -> Any:
    """What belongs to a block's router in a tree that starts below "stack"; None: nothing."""
    return ((place.find(tree) or {}).get(place.module) or {}).get("router")


def _replaced(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> dict[str, Any]:
    """`tree` with `leaf` at `path`."""
    return tree | {path[0]: _replaced(tree[path[0]], path[1:], leaf) if len(path) > 1 else leaf}


def start_router_state(router_state: Any, token_shares: Callable[[], np.ndarray], config: ModelConfig, vocab_size: int) -> Any:
    """The routers' state before the first step, on the devices of `router_state`; see `Router.start`.

    token_shares: gives float64 [V], the share of each id in the training text; called once, and only if a router asks.
    """
    shares = functools.cache(lambda: token_shares())
    before = state = router_state.get("stack", {})
    for place in stacked_places(config, "routed"):
        router, moe, old = ROUTERS[place.ffn.moe.router], place.ffn.moe, _router(place, state)
        if router.start is None or not old:
            continue
        sizes, host, stacked = router_sizes(moe, vocab_size), jax.device_get(old), place.group is not None
        groups = len(jax.tree.leaves(host)[0]) if stacked else 1
        parts = [jax.tree.map(lambda a: a[g], host) if stacked else host for g in range(groups)]
        parts = [router.start(part, shares, sizes, moe.options) for part in parts]
        new = jax.tree.map(lambda *a: np.stack(a), *parts) if stacked else parts[0]
        new = jax.tree.map(lambda a, b: jax.device_put(np.asarray(a, b.dtype), b.sharding), new, old)
        state = _replaced(state, (*place.path, place.module, "router"), new)
    return router_state if state is before else {"stack": state}
