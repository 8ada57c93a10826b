"""Options of the router `hash`."""

from typing import TYPE_CHECKING, ClassVar

from moe_jax.config.leaf import field
from moe_jax.config.routers.options import RouterOptions, Traits, router_options

if TYPE_CHECKING:
    from moe_jax.config.moe import MoEConfig


@router_options
class HashConfig(RouterOptions):
    """Options of the router `hash`: the expert is a table's entry for the token id."""

    traits: ClassVar[Traits] = Traits(top_k=(1,), virtual=False)
    table: str = field(
        "balanced",
        "balanced: ids in order of their count in the training text, each to the least loaded expert; random.",
        choices=("balanced", "random"),
    )
    seed: int = field(0, "Of the random table, and of ties in the balanced one.", low=0, high=2**31 - 1)

    def columns(self, moe: "MoEConfig") -> float:
        return 0

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        return 1.0, ""
