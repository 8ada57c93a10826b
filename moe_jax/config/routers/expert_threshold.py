"""Options of the router `expert_threshold`."""

from typing import TYPE_CHECKING, ClassVar

from moe_jax.config.leaf import ConfigError, field
from moe_jax.config.routers.options import RouterOptions, Traits, check_max_k, max_k_field, router_options, z_field

if TYPE_CHECKING:
    from moe_jax.config.moe import MoEConfig


@router_options
class ExpertThresholdConfig(RouterOptions):
    """Options of the router `expert_threshold`: every expert whose score is above a threshold of its own (arXiv:2603.11535).

    The thresholds follow the scores of whole steps, so that each expert gets K / E of the tokens without a balance loss.
    """

    traits: ClassVar[Traits] = Traits(virtual=False)
    decay: float = field(
        0.99, "Of the running mean of the thresholds; the first steps are averaged evenly.", low=0, high=0.999999
    )
    max_k: int = max_k_field()
    z_loss: float = z_field(0.0)

    def check(self, moe: "MoEConfig", path: str, tokens: int) -> None:
        check_max_k(self.max_k, moe, path)
        if moe.top_k >= moe.experts:
            limit = f"each expert takes K / E of the tokens, of {path}experts={moe.experts}"
            raise ConfigError(f"{path}top_k", moe.top_k, limit, "lower it")

    def varies(self, moe: "MoEConfig") -> bool:
        return True

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        return 1.0, "expert_threshold: the gates are sigmoids"
