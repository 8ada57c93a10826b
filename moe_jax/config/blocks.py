"""The blocks of a decoder as `model.pattern`, `model.inserts` and `model.ffns` name them."""

import dataclasses
import re
from typing import NamedTuple

from moe_jax.config.leaf import ConfigError
from moe_jax.config.model import FFNConfig, ModelConfig

BUILT_IN = ("dense", "routed", "peer", "pkm")
RETRIEVING = ("peer", "pkm")
_INSERT = re.compile(r"([A-Za-z_]\w*)=(\w+)@(\d+)", re.ASCII)
# Keys that stand beside or in place of inserts in the trees of parameters, statistics and metrics.
_TAKEN = re.compile(r"groups|earlier|counts|tokens|experts|pool|pool_\w+|peer|moe|layer_\d+", re.ASCII)


class Insert(NamedTuple):
    """An extra block: its name, its feed-forward layer, and the block of the groups that it stands before."""

    name: str
    ffn: FFNConfig
    before: int


def feed_forward(model: ModelConfig, name: str) -> FFNConfig | None:
    """The layer of that name, its hidden width filled in; None: there is none."""
    if name in BUILT_IN:
        return FFNConfig(name, kind=name, width=model.ffn_width, moe=model.moe, peer=model.peer)
    named = next((ffn for ffn in model.ffns if ffn.name == name), None)
    return named and dataclasses.replace(named, width=named.width or model.ffn_width)


def options_path(model: ModelConfig, ffn: FFNConfig) -> str:
    """Dotted path of the section that has the layer's `moe` and `peer`, such as 'model.' or 'model.ffns[1].'."""
    names = [other.name for other in model.ffns]
    return f"model.ffns[{names.index(ffn.name)}]." if ffn.name in names else "model."


def _names(model: ModelConfig) -> str:
    return ", ".join([*BUILT_IN, *(ffn.name for ffn in model.ffns)])


def parse_pattern(model: ModelConfig) -> tuple[FFNConfig, ...]:
    """The feed-forward layers of one repeating group.

    Raises:
      ConfigError: a layer that does not exist.
    """
    layers = []
    for name in model.pattern.split(","):
        layers.append(feed_forward(model, name))
        if layers[-1] is None:
            fix = f"use {_names(model)}, separated by commas without spaces, or add a layer to model.ffns"
            raise ConfigError("model.pattern", model.pattern, f"no feed-forward layer {name!r}", fix)
    return tuple(layers)


def parse_inserts(model: ModelConfig) -> tuple[Insert, ...]:
    """The extra blocks, in the order written.

    Raises:
      ConfigError: bad syntax, a layer that does not exist, a name that is repeated or taken, or a place inside a group.
    """
    inserts: list[Insert] = []
    group = len(parse_pattern(model))
    for text in model.inserts.split(",") if model.inserts else ():
        match = _INSERT.fullmatch(text)
        ffn = match and feed_forward(model, match[2])
        if not ffn:
            fix = f"write name=layer@block, layer one of {_names(model)}"
            raise ConfigError("model.inserts", model.inserts, f"cannot read {text!r}", fix)
        name, place = match[1], int(match[3])
        if _TAKEN.fullmatch(name):
            limit = f"the name {name} means something else among the blocks"
            raise ConfigError("model.inserts", model.inserts, limit, "use another, such as first")
        if name in (other.name for other in inserts):
            raise ConfigError("model.inserts", model.inserts, f"the name {name} is there twice", "rename one")
        if place > model.layers or place % group:
            limit = f"block {place} is not between groups of model.pattern={model.pattern}"
            fix = f"use a multiple of {group} from 0 to model.layers={model.layers}"
            raise ConfigError("model.inserts", model.inserts, limit, fix)
        if match[2] == "dense" and model.insert_width:
            ffn = dataclasses.replace(ffn, width=model.insert_width)
        inserts.append(Insert(name, ffn, place))
    return tuple(inserts)


def block_layers(model: ModelConfig, *kinds: str) -> list[FFNConfig]:
    """The feed-forward layers of all blocks, of these kinds or of any: the repeating groups in order, then the inserts."""
    pattern = parse_pattern(model)
    layers = [*pattern * (model.layers // len(pattern)), *(insert.ffn for insert in parse_inserts(model))]
    return [ffn for ffn in layers if not kinds or ffn.kind in kinds]


def distinct_layers(model: ModelConfig, *kinds: str) -> list[FFNConfig]:
    """`block_layers`, each once."""
    found: list[FFNConfig] = []
    for ffn in block_layers(model, *kinds):
        if ffn not in found:
            found.append(ffn)
    return found


def most_earlier_tokens(model: ModelConfig) -> int:
    """P, how many ids before a token's own the routers of a model read at most."""
    return max((ffn.moe.options.earlier_tokens for ffn in distinct_layers(model, "routed")), default=0)


def expert_shards(model: ModelConfig, ffn: FFNConfig) -> int:
    """G, how many experts of a routed layer make up a dense one.

    Raises:
      ConfigError: no whole number of them.
    """
    width = expert_width(model, ffn)
    if model.ffn_width % width:
        limit = f"does not divide model.ffn_width={model.ffn_width}, whose layers init.upcycle_from makes experts of"
        path = options_path(model, ffn) + "moe.expert_width"
        raise ConfigError(path, width, limit, "use a divisor, or 0 for whole layers")
    return model.ffn_width // width


def expert_width(model: ModelConfig, ffn: FFNConfig) -> int:
    """Hidden width F of an expert of a routed layer."""
    return ffn.moe.expert_width or model.ffn_width
