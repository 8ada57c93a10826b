"""Where the blocks of a model are: one iterator for all code that walks over parameters, statistics, metrics or costs."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from moe_jax.config import FFNConfig, ModelConfig
from moe_jax.config.blocks import BUILT_IN, parse_inserts, parse_pattern

# Name of the feed-forward module of a block, by its kind.
MODULES = {"dense": "ffn", "routed": "moe", "peer": "peer", "pkm": "peer"}


class Place(NamedTuple):
    """One block.

    name: of its statistics and metrics: "layer_07", or the name of an insert.
    number: folded into its noise key: i for block i of the groups, L + j for insert j.
    path: of its variables below "stack": ("groups", "block_1") or (name,).
    group: index along the axis of groups on which its variables are stacked; None: they are not stacked.
    ffn: its feed-forward layer.
    """

    name: str
    number: int
    path: tuple[str, ...]
    group: int | None
    ffn: FFNConfig

    @property
    def prefix(self) -> str:
        """Path of its variables below the collection: "stack/groups/block_1"."""
        return "/".join(("stack", *self.path))

    @property
    def module(self) -> str:
        """Name of its feed-forward module."""
        return MODULES[self.ffn.kind]

    @property
    def own_experts(self) -> str:
        """Path of the experts that its layer has for itself; of a layer that shares its pool, where they would be."""
        return f"{self.prefix}/{self.module}/experts"

    def find(self, tree: Any) -> Any:
        """What is at its path in a tree that starts below "stack", stacked over groups; None: nothing."""
        for key in self.path:
            tree = tree.get(key) if tree else None
        return tree


def places(config: ModelConfig, *kinds: str) -> list[Place]:
    """Every block whose layer is of one of these kinds, or all, in the order in which a token meets them."""
    return [place for place in _all_places(config) if not kinds or place.ffn.kind in kinds]


def _all_places(config: ModelConfig) -> Iterator[Place]:
    pattern = parse_pattern(config)
    inserts = sorted(enumerate(parse_inserts(config)), key=lambda one: one[1].before)
    for number in range(config.layers + 1):
        for j, insert in inserts:
            if insert.before == number:
                yield Place(insert.name, config.layers + j, (insert.name,), None, insert.ffn)
        if number < config.layers:
            group, i = divmod(number, len(pattern))
            yield Place(f"layer_{number:02d}", number, ("groups", f"block_{i}"), group, pattern[i])


def deciding_places(config: ModelConfig) -> list[Place]:
    """The blocks whose router decides how many experts a token takes, in the order in which a token meets them."""
    return [place for place in places(config, "routed") if place.ffn.moe.options.varies(place.ffn.moe)]


def stacked_places(config: ModelConfig, *kinds: str) -> list[Place]:
    """`places` whose variables are different arrays: the first of all the groups, and the inserts."""
    return [place for place in places(config, *kinds) if not place.group]


def pool_path(place: Place) -> str:
    """Path in `params` of the pool of a block that retrieves; blocks that share a pool have the same path."""
    if place.ffn.peer.share_pool:
        return f"stack/{shared_pool(place.ffn)}/experts"
    return place.own_experts


def shared_pool(ffn: FFNConfig) -> str:
    """Name below "stack" of the pool that the blocks of a layer share; "": each has its own."""
    if not ffn.peer.share_pool or ffn.kind not in ("peer", "pkm"):
        return ""
    return "pool" if ffn.name in BUILT_IN else f"pool_{ffn.name}"


def by_layer(tree: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """{"groups": {"block_i": leaves [G, ...]}, name: leaves} -> {"layer_07": leaves, name: leaves}, in order of depth."""
    placed = ((place, place.find(tree)) for place in places(config))
    return {
        place.name: leaves if place.group is None else jax.tree.map(lambda a, g=place.group: a[g], leaves)
        for place, leaves in placed
        if leaves is not None
    }
