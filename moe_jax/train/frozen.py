"""What does not learn: the parameters of a group of scale 0, and the leaves that a router freezes while the run goes on.

A frozen parameter has no gradient, no share of the gradient's norm, no moments, no weight decay, no average and no
update. Those of a group are known before the step is compiled: they are not differentiated, and the optimizer's
state has no leaf for them. Those of a router depend on its state: a traced flag selects the old values, so that the
leaf, its moments and its average keep their bits.
"""

from collections.abc import Iterable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from moe_jax.config import ModelConfig, OptimizerConfig
from moe_jax.models.places import stacked_places
from moe_jax.routing import ROUTERS
from moe_jax.train.optimizer import group_settings


def frozen_paths(config: OptimizerConfig, paths: Iterable[str]) -> frozenset[str]:
    """Those of the paths of parameters that are in a group of scale 0."""
    return frozenset(path for path in paths if group_settings(config, path)[0] == 0)


def frozen_by_routers(config: ModelConfig, router_state: Any, params: Any) -> dict[str, jax.Array]:
    """{path of a parameter: whether it is frozen, bool}, from what `Router.frozen` says of each routed layer's state.

    The flags broadcast against the parameters: [G, 1, ...] of leaves stacked over groups, else [1, ...].

    Raises:
      ValueError: a router names a leaf that is no parameter of it.
    """
    flag_of, shapes = {}, flax.traverse_util.flatten_dict(params, sep="/")
    for place in stacked_places(config, "routed"):
        name, state = place.ffn.moe.router, place.find(router_state.get("stack"))
        frozen = ROUTERS[name].frozen
        if frozen is None or not state:
            continue
        flags = (frozen if place.group is None else jax.vmap(frozen))(state[place.module]["router"])
        for leaf, flag in flags.items():
            path = f"{place.prefix}/{place.module}/router/{leaf}"
            if path not in shapes:
                raise ValueError(f"ROUTER.frozen of {name} names {path}, which is no parameter")
            flag_of[path] = jnp.reshape(flag, flag.shape + (1,) * (shapes[path].ndim - flag.ndim))
    return flag_of


def frozen_count(frozen: dict[str, jax.Array]) -> jax.Array:
    """int32 scalar: how many leaves, each block's by itself, of what `frozen_by_routers` returns are frozen."""
    return sum((jnp.sum(flag, dtype=jnp.int32) for flag in frozen.values()), start=jnp.int32(0))


def keep_frozen(frozen: dict[str, jax.Array], old: Any, new: Any) -> Any:
    """`new` with the values of `old` where `frozen` says so; trees of the structure of the parameters, or of a part of them."""
    if not frozen:
        return new
    old, new = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (old, new))
    kept = {path: jnp.where(frozen[path], old[path], x) if path in frozen else x for path, x in new.items()}
    return flax.traverse_util.unflatten_dict(kept, sep="/")


def keep_frozen_moments(frozen: dict[str, jax.Array], old: Any, new: Any) -> Any:
    """The same for the state of an optimizer, in which every dict has the structure of the parameters."""

    def is_dict(tree):
        return isinstance(tree, dict)

    return jax.tree.map(lambda a, b: keep_frozen(frozen, a, b) if is_dict(b) else b, old, new, is_leaf=is_dict)
