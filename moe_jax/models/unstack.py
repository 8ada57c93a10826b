"""Variables in the form for decoding: a tree for each group of blocks instead of arrays stacked over the groups."""

from typing import Any

import flax.linen as nn
import jax

from moe_jax import compat
from moe_jax.config import ModelConfig
from moe_jax.config.blocks import parse_pattern
from moe_jax.models.places import places

# The program grows with the blocks, and with the experts that it names: beyond these numbers they stay stacked.
MOST_BLOCKS = 64
MOST_EXPERTS = 256
# With more rows, blocks of sorted ones take as long as experts that stand alone.
FEW_ROWS = 16


def unstack(config: ModelConfig, variables: dict[str, Any], rows: int) -> dict[str, Any]:
    """Variables of a model with `stack/groups` as a tuple of groups; for calls with a cache of that form.

    A loop over groups copies its slice of every stacked array, for every token. On a single CPU, for at most `FEW_ROWS` rows,
    the experts of layers with the backend "auto" are split too: each weight is a tuple of its E parts, see `ops.split_experts`.
    A model of more than `MOST_BLOCKS` blocks stays as it is, as do more than `MOST_EXPERTS` experts of all blocks together.

    Args:
      config: the model's.
      variables: `params`, and `router_state` where the model has one.
      rows: B.
    """
    if is_unstacked(variables) or config.layers > MOST_BLOCKS:
        return variables
    groups = config.layers // len(parse_pattern(config))
    variables = {name: {**nn.unbox(tree)} for name, tree in variables.items()}
    for tree in variables.values():
        if "groups" in tree.get("stack", {}):
            parts = tuple(jax.tree.map(lambda a, g=g: a[g], tree["stack"]["groups"]) for g in range(groups))
            tree["stack"] = tree["stack"] | {"groups": parts}
    routed, mesh = [place for place in places(config, "routed") if place.ffn.moe.backend == "auto"], compat.current_mesh()
    one_cpu = compat.target_platform() == "cpu" and (mesh is None or mesh.size == 1)
    if one_cpu and rows <= FEW_ROWS and sum(place.ffn.moe.experts for place in routed) <= MOST_EXPERTS:
        for place in routed:
            block = variables["params"]["stack"]
            for key in place.path[:1] if place.group is None else (place.path[0], place.group, place.path[1]):
                block = block[key]
            block[place.module]["experts"] = jax.tree.map(tuple, block[place.module]["experts"])
    return variables


def is_unstacked(variables: dict[str, Any]) -> bool:
    """Whether `unstack` made them."""
    return isinstance(variables["params"]["stack"].get("groups"), tuple)
