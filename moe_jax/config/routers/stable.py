"""Options of the router `stable`."""

import math
from typing import TYPE_CHECKING

from moe_jax.config.leaf import ConfigError, field
from moe_jax.config.routers.base import BaseConfig
from moe_jax.config.routers.options import RouterOptions, Traits, router_options
from moe_jax.config.routers.switch import SwitchConfig
from moe_jax.config.routers.top_k import TopKConfig

if TYPE_CHECKING:
    from moe_jax.config.moe import MoEConfig
    from moe_jax.config.routers import RoutersConfig


@router_options
class StableConfig(RouterOptions):
    """Options of the router `stable`: StableMoE, a balanced routing that is learned, distilled and frozen."""

    backbone: str = field(
        "affinity",
        "Who routes in stage 1: affinity, StableMoE's own; or a router whose gate follows from the token and the expert "
        "(base, switch, top_k), with its options.",
        choices=("affinity", "base", "switch", "top_k"),
    )
    stage_1: float = field(
        0.1,
        "Share of train.steps in which the routing is learned and distilled; then it is frozen. 1: never frozen.",
        low=1e-6,
        high=1,
    )
    light_router: str = field(
        "embedding",
        "What the light router reads: embedding, the token's id; window, the last light_window ids of its document; "
        "balanced, for comparison: no router but a table balanced over the training text, as hash has it, without a stage 1.",
        choices=("embedding", "window", "balanced"),
    )
    light_window: int = field(5, "Ids that the light router window reads, the token's own included.", low=2)
    light_width: int = field(50, "Width W of the light router's word vectors.", low=1)
    evaluation: str = field(
        "light",
        "Whose expert evaluation takes in stage 1: light, the distilled router's; backbone, the backbone's.",
        choices=("light", "backbone"),
        role="scoring",
    )
    balance_loss: float = field(
        0.3, "Weight of the balance loss of the backbone affinity in stage 1 (equation 8, by token).", low=0
    )
    distillation_loss: float = field(1.0, "Weight of the light router's cross-entropy in stage 1 (equation 10).", low=0)

    @property
    def traits(self) -> Traits:
        """Those of the backbone, without virtual experts; once frozen, any of them can be limited."""
        known = {"base": BaseConfig, "switch": SwitchConfig, "top_k": TopKConfig}.get(self.backbone)
        of_backbone = known.traits if known else Traits(top_k=(1,))
        return of_backbone._replace(virtual=False, capacity=True)

    @property
    def earlier_tokens(self) -> int:
        return self.light_window - 1 if self.light_router == "window" else 0

    @property
    def of_backbone(self) -> RouterOptions:
        """The options of the backbone: these themselves of `affinity`; of others see `beside`."""
        return self

    def beside(self, routers: "RoutersConfig") -> "StableConfig":
        if self.backbone == "affinity":
            return self
        return _StableBeside(**vars(self), of_backbone=getattr(routers, self.backbone))

    def check(self, moe: "MoEConfig", path: str, tokens: int) -> None:
        if self.light_router == "balanced" and moe.top_k > 1:
            limit = f"the table {path}routers.stable.light_router=balanced has one expert for an id"
            raise ConfigError(f"{path}top_k", moe.top_k, limit, "use 1")
        if self.backbone != "affinity":
            self.of_backbone.check(moe, path, tokens)

    def stage_1_steps(self, steps: int) -> int | None:
        """How many of `steps` are stage 1, at least one; None: all, and the routing is never frozen."""
        return None if self.stage_1 == 1 else max(math.ceil(self.stage_1 * steps - 1e-6), 1)

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        if self.backbone == "affinity":
            return 1.0, "stable: the gate is a sigmoid"
        total, why = self.of_backbone.gate_sum(moe, shards)
        return total, why or ("stable: the light router does not keep the shards of a layer together" if shards > 1 else "")

    def state_kind(self, moe: "MoEConfig") -> str:
        return f"backbone={self.backbone}, light_router={self.light_router}, top_k={moe.top_k}"


@router_options
class _StableBeside(StableConfig):
    """`StableConfig` with the options of its backbone."""

    of_backbone: RouterOptions = RouterOptions()
