"""Options of the router `remoe`."""

from typing import TYPE_CHECKING, ClassVar

from moe_jax.config.leaf import field
from moe_jax.config.routers.options import RouterOptions, Traits, check_max_k, max_k_field, router_options, z_field

if TYPE_CHECKING:
    from moe_jax.config.moe import MoEConfig


@router_options
class ReMoEConfig(RouterOptions):
    """Options of the router `remoe`: ReLU gates, as many experts as are above 0, K on average by a controller."""

    traits: ClassVar[Traits] = Traits(virtual=False)
    max_k: int = max_k_field()
    start_weight: float = field(1e-8, "Weight of the sparsity loss at the start.", low=1e-20, high=1e6)
    rate: float = field(1.2, "The weight is multiplied or divided by this after each step.", low=1.000001)
    z_loss: float = z_field(0.0)

    def check(self, moe: "MoEConfig", path: str, tokens: int) -> None:
        check_max_k(self.max_k, moe, path)

    def varies(self, moe: "MoEConfig") -> bool:
        return True

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        return 1.0, "remoe: the gates are those of a ReLU"
