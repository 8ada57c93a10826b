"""Options of the router `soft_moe`."""

from typing import TYPE_CHECKING, ClassVar

from moe_jax.config.leaf import field
from moe_jax.config.routers.options import RouterOptions, Traits, router_options

if TYPE_CHECKING:
    from moe_jax.config.moe import MoEConfig


@router_options
class SoftMoEConfig(RouterOptions):
    """Options of the router `soft_moe`: slots are mixtures of a sequence's tokens."""

    traits: ClassVar[Traits] = Traits(
        causal=False, causal_training=False, top_k=(1,), virtual=False, capacity=False, exchange=False
    )
    slots: int = field(1, "Slots C of an expert for each sequence.", low=1)

    def columns(self, moe: "MoEConfig") -> float:
        """Of the logits, and of the two products that mix tokens into the slots and back."""
        return 3 * moe.experts * self.slots

    def experts_per_token(self, moe: "MoEConfig", sequence_length: int) -> float:
        """A sequence fills the slots, however long it is."""
        return moe.experts * self.slots / sequence_length

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        return 1.0, "soft_moe: experts see mixtures of tokens"
