"""Options of the router `expert_choice`."""

from moe_jax.config.leaf import field
from moe_jax.config.routers.options import RouterOptions, Traits, router_options, z_field


@router_options
class ExpertChoiceConfig(RouterOptions):
    """Options of the router `expert_choice`: every expert takes its C best tokens, K a token on average."""

    evaluation: str = field(
        "experts",
        "Who chooses in evaluation: experts, as in training; tokens: each its K best experts by the same scores, "
        "which is causal.",
        choices=("experts", "tokens"),
        role="scoring",
    )
    z_loss: float = z_field(0.0)

    @property
    def traits(self) -> Traits:
        """What it can do depends on who chooses."""
        causal = self.evaluation == "tokens"
        where = " in training; evaluation by tokens is dropless with the default exchange" if causal else ""
        return Traits(causal=causal, causal_training=False, virtual=False, capacity=False, exchange=False, except_in=where)
