"""Options of the router `gshard`."""

from typing import TYPE_CHECKING, ClassVar

from moe_jax.config.leaf import field
from moe_jax.config.routers.options import RouterOptions, Traits, balance_field, router_options, z_field

if TYPE_CHECKING:
    from moe_jax.config.moe import MoEConfig


_POLICIES = ("all", "threshold", "random")


@router_options
class GShardConfig(RouterOptions):
    """Options of the router `gshard`: the two most probable experts, the second not always."""

    traits: ClassVar[Traits] = Traits(top_k=(2,))
    second_expert: str = field(
        "random",
        "Second expert in training: all; threshold: where its gate is above `threshold`; random: with probability "
        "gate / threshold.",
        choices=_POLICIES,
    )
    eval_second_expert: str = field(
        "all", "The same in evaluation; random draws nothing there.", choices=_POLICIES[:2], role="scoring"
    )
    threshold: float = field(
        0.5, "Gate, of a pair that sums to 1, from which on `random` always keeps it.", low=1e-6, high=1, role="scoring"
    )
    balance_loss: float = balance_field(0.01)
    z_loss: float = z_field(0.0)

    def varies(self, moe: "MoEConfig") -> bool:
        return self.second_expert != "all" or super().varies(moe)

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        if (self.second_expert, self.eval_second_expert) == ("all", "all"):
            return 1.0, ""
        return 1.0, "gshard: where the second expert does not run, the gate of the first stays below 1"
