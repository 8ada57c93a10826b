"""Options of the router `switch`."""

from typing import ClassVar

from moe_jax.config.routers.options import RouterOptions, Traits, balance_field, jitter_field, router_options, z_field


@router_options
class SwitchConfig(RouterOptions):
    """Options of the router `switch`: the most probable expert, its probability as the gate."""

    traits: ClassVar[Traits] = Traits(top_k=(1,))
    jitter: float = jitter_field()
    balance_loss: float = balance_field(0.01)
    z_loss: float = z_field(0.0)
