"""Options of the router `base`."""

from typing import TYPE_CHECKING, ClassVar

from moe_jax.config.leaf import ConfigError, field
from moe_jax.config.routers.options import RouterOptions, Traits, router_options

if TYPE_CHECKING:
    from moe_jax.config.moe import MoEConfig


@router_options
class BaseConfig(RouterOptions):
    """Options of the router `base`: balanced assignment in training, the best expert in evaluation."""

    traits: ClassVar[Traits] = Traits(causal_training=False, top_k=(1,), virtual=False, capacity=False)
    groups: int = field(
        1, "Equal parts of a microbatch balanced each by itself, such as one per shard; 1: all tokens together.", low=1
    )

    def check(self, moe: "MoEConfig", path: str, tokens: int) -> None:
        if tokens % self.groups:
            limit = f"does not divide the {tokens} tokens of a microbatch"
            raise ConfigError(f"{path}routers.base.groups", self.groups, limit, "use a divisor")

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        return 1.0, "base: the gate is a sigmoid"
