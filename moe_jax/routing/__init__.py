"""Who writes the nonzeros: one file per router, and what they share."""

from moe_jax.routing.contract import Router, Sizes
from moe_jax.routing.registry import ROUTERS

__all__ = ["ROUTERS", "Router", "Sizes"]
