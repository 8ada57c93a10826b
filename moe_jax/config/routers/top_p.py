"""Options of the router `top_p`."""

from typing import TYPE_CHECKING, ClassVar

from moe_jax.config.leaf import ConfigError, field
from moe_jax.config.routers.options import RouterOptions, Traits, balance_field, max_k_field, router_options, z_field

if TYPE_CHECKING:
    from moe_jax.config.moe import MoEConfig


@router_options
class TopPConfig(RouterOptions):
    """Options of the router `top_p`: the most probable experts until their probabilities sum to p (arXiv:2403.07652)."""

    traits: ClassVar[Traits] = Traits()
    p: float = field(0.4, "A token takes experts until their probabilities sum to this.", low=1e-6, high=1, role="scoring")
    max_k: int = max_k_field()
    entropy_loss: float = field(
        1e-4, "Weight of the entropy of a token's probabilities, nats, without which they flatten and more run.", low=0
    )
    balance_loss: float = balance_field(0.01)
    z_loss: float = z_field(0.0)

    def check(self, moe: "MoEConfig", path: str, tokens: int) -> None:
        columns = moe.experts + moe.virtual_experts
        if self.max_k > columns:
            raise ConfigError(f"{path}routers.top_p.max_k", self.max_k, f"more than the {columns} experts", "use 0 for all")
        if (moe.execution == "capacity" or moe.eval_capacity) and (self.max_k or columns) < moe.top_k:
            limit = f"below {path}top_k={moe.top_k}, which the capacity follows"
            raise ConfigError(f"{path}routers.top_p.max_k", self.max_k, limit, "raise it, or lower top_k")

    def varies(self, moe: "MoEConfig") -> bool:
        return True

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        return 1.0, "top_p: the gates are raw probabilities, which do not sum to 1"
