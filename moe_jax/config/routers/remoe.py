"""Options of the router `remoe`."""

from typing import TYPE_CHECKING, ClassVar

from moe_jax.config.leaf import ConfigError, field
from moe_jax.config.routers.options import RouterOptions, Traits, router_options, z_field

if TYPE_CHECKING:
    from moe_jax.config.moe import MoEConfig


@router_options
class ReMoEConfig(RouterOptions):
    """Options of the router `remoe`: ReLU gates, as many experts as are above 0, K on average by a controller."""

    traits: ClassVar[Traits] = Traits(virtual=False)
    max_k: int = field(0, "Most experts of a token; what is above is dropped and counted; 0: all.", low=0, role="scoring")
    start_weight: float = field(1e-8, "Weight of the sparsity loss at the start.", low=1e-20, high=1e6)
    rate: float = field(1.2, "The weight is multiplied or divided by this after each step.", low=1.000001)
    z_loss: float = z_field(0.0)

    def check(self, moe: "MoEConfig", path: str, tokens: int) -> None:
        low, high = moe.top_k, moe.experts
        if self.max_k and not low <= self.max_k <= high:
            limit = f"not from {path}top_k={low} to {path}experts={high}"
            raise ConfigError(f"{path}routers.remoe.max_k", self.max_k, limit, "use 0 for all")

    def varies(self, moe: "MoEConfig") -> bool:
        return True

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        return 1.0, "remoe: the gates are those of a ReLU"
