"""The options of each router: one file a router, and the table of them."""

import dataclasses

from moe_jax.config.routers.adaptive import AdaptiveConfig
from moe_jax.config.routers.base import BaseConfig
from moe_jax.config.routers.expert_choice import ExpertChoiceConfig
from moe_jax.config.routers.expert_threshold import ExpertThresholdConfig
from moe_jax.config.routers.gshard import GShardConfig
from moe_jax.config.routers.hash import HashConfig
from moe_jax.config.routers.options import RouterOptions, Traits
from moe_jax.config.routers.remoe import ReMoEConfig
from moe_jax.config.routers.soft_moe import SoftMoEConfig
from moe_jax.config.routers.stable import StableConfig
from moe_jax.config.routers.switch import SwitchConfig
from moe_jax.config.routers.top_k import TopKConfig
from moe_jax.config.routers.top_p import TopPConfig

__all__ = [
    "AdaptiveConfig",
    "BaseConfig",
    "ExpertChoiceConfig",
    "ExpertThresholdConfig",
    "GShardConfig",
    "HashConfig",
    "ROUTER_NAMES",
    "ReMoEConfig",
    "RouterOptions",
    "RoutersConfig",
    "SoftMoEConfig",
    "StableConfig",
    "SwitchConfig",
    "TopKConfig",
    "TopPConfig",
    "Traits",
    "register_options",
]


@dataclasses.dataclass(repr=False, eq=False)
class RoutersConfig:
    """The routers: a field is the name of a file in `moe_jax/routing`, with its options.

    Only those of `router` count. `register_options` adds a field, also to configs that are there already.
    """

    top_k: TopKConfig = dataclasses.field(default_factory=TopKConfig)
    switch: SwitchConfig = dataclasses.field(default_factory=SwitchConfig)
    gshard: GShardConfig = dataclasses.field(default_factory=GShardConfig)
    adaptive: AdaptiveConfig = dataclasses.field(default_factory=AdaptiveConfig)
    top_p: TopPConfig = dataclasses.field(default_factory=TopPConfig)
    base: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    hash: HashConfig = dataclasses.field(default_factory=HashConfig)
    stable: StableConfig = dataclasses.field(default_factory=StableConfig)
    expert_choice: ExpertChoiceConfig = dataclasses.field(default_factory=ExpertChoiceConfig)
    expert_threshold: ExpertThresholdConfig = dataclasses.field(default_factory=ExpertThresholdConfig)
    remoe: ReMoEConfig = dataclasses.field(default_factory=ReMoEConfig)
    soft_moe: SoftMoEConfig = dataclasses.field(default_factory=SoftMoEConfig)

    def __getattr__(self, name: str) -> RouterOptions:
        leaf = type(self).__dataclass_fields__.get(name)
        if leaf is None:
            raise AttributeError(f"no router {name!r}")
        setattr(self, name, leaf.default_factory())
        return getattr(self, name)

    def __repr__(self) -> str:
        options = (f"{entry.name}={getattr(self, entry.name)!r}" for entry in dataclasses.fields(self))
        return f"RoutersConfig({', '.join(options)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoutersConfig) and repr(self) == repr(other)


# The choices of `model.moe.router`.
ROUTER_NAMES = [entry.name for entry in dataclasses.fields(RoutersConfig)]


def register_options(name: str, options: type[RouterOptions]) -> None:
    """Adds a router's options to the table; see `moe_jax.register_router`.

    Args:
      name: of the router, in `model.moe.router` and `model.moe.routers`.
      options: a dataclass under `RouterOptions` whose fields are made by `moe_jax.config.field` and all have defaults.

    Raises:
      ValueError: the name is taken by other options or is no identifier, or `options` is something else.
    """
    if not name.isidentifier() or not (dataclasses.is_dataclass(options) and issubclass(options, RouterOptions)):
        raise ValueError(f"register_router({name!r}, {options!r}): a name and a dataclass under RouterOptions are wanted")
    known = RoutersConfig.__dataclass_fields__
    if name in known and known[name].type is not options:
        raise ValueError(f"register_router: the name {name!r} is taken by {known[name].type.__name__}; use another")
    if name not in known:
        made = dataclasses.make_dataclass("_Row", [(name, options, dataclasses.field(default_factory=options))])
        known[name] = made.__dataclass_fields__[name]
        ROUTER_NAMES.append(name)
