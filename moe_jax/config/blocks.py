"""The blocks of a decoder as `model.pattern` and `model.inserts` name them."""

import re

from moe_jax.config.leaf import ConfigError
from moe_jax.config.model import ModelConfig

RETRIEVING = ("peer", "pkm")
BLOCK_KINDS = ("dense", "routed", *RETRIEVING)
_INSERT = re.compile(r"([A-Za-z_]\w*)=(\w+)@(\d+)", re.ASCII)
# Keys that stand beside or in place of inserts in the trees of parameters, statistics and metrics.
_TAKEN = re.compile(r"groups|counts|tokens|experts|pool|peer|moe|layer_\d+", re.ASCII)


def parse_pattern(model: ModelConfig) -> tuple[str, ...]:
    """The feed-forward kinds of one repeating group, such as ('dense', 'routed').

    Raises:
      ConfigError: a kind that does not exist.
    """
    kinds = tuple(model.pattern.split(","))
    for kind in kinds:
        if kind not in BLOCK_KINDS:
            fix = f"use {' and '.join(BLOCK_KINDS)}, separated by commas without spaces"
            raise ConfigError("model.pattern", model.pattern, f"no block kind {kind!r}", fix)
    return kinds


def parse_inserts(model: ModelConfig) -> tuple[tuple[str, str, int], ...]:
    """The extra blocks as (name, kind, index of the block they stand before), in the order written.

    Raises:
      ConfigError: bad syntax, a kind that does not exist, a name that is repeated or taken, or a place inside a group.
    """
    inserts, group = [], len(parse_pattern(model))
    for text in model.inserts.split(",") if model.inserts else ():
        match = _INSERT.fullmatch(text)
        if not match or match[2] not in BLOCK_KINDS:
            kinds = " or ".join(BLOCK_KINDS)
            raise ConfigError(
                "model.inserts",
                model.inserts,
                f"cannot read {text!r}",
                f"write name=kind@block, kind {kinds}",
            )
        name, place = match[1], int(match[3])
        if _TAKEN.fullmatch(name):
            limit = f"the name {name} means something else among the blocks"
            raise ConfigError("model.inserts", model.inserts, limit, "use another, such as first")
        if name in (other for other, _, _ in inserts):
            raise ConfigError("model.inserts", model.inserts, f"the name {name} is there twice", "rename one")
        if place > model.layers or place % group:
            limit = f"block {place} is not between groups of model.pattern={model.pattern}"
            fix = f"use a multiple of {group} from 0 to model.layers={model.layers}"
            raise ConfigError("model.inserts", model.inserts, limit, fix)
        inserts.append((name, match[2], place))
    return tuple(inserts)


def block_kinds(model: ModelConfig) -> list[str]:
    """The feed-forward kinds of all blocks: of the repeating groups in order, then of the inserts."""
    kinds = parse_pattern(model)
    return list(kinds) * (model.layers // len(kinds)) + [kind for _, kind, _ in parse_inserts(model)]


def has_routed_blocks(model: ModelConfig) -> bool:
    """Whether any block of the model is a mixture of experts."""
    return "routed" in block_kinds(model)


def has_retrieval_blocks(model: ModelConfig) -> bool:
    """Whether any block retrieves one-neuron experts or values."""
    return any(kind in RETRIEVING for kind in block_kinds(model))


def expert_shards(model: ModelConfig) -> int:
    """G, how many experts make up a dense feed-forward layer.

    Raises:
      ConfigError: no whole number of them.
    """
    width = model.moe.expert_width or model.ffn_width
    if model.ffn_width % width:
        limit = f"does not divide model.ffn_width={model.ffn_width}, whose layers init.upcycle_from makes experts of"
        raise ConfigError("model.moe.expert_width", width, limit, "use a divisor, or 0 for whole layers")
    return model.ffn_width // width
