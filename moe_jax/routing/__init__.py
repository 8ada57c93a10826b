"""Who writes the nonzeros: one file per router, and what they share."""

from moe_jax.routing.registry import ROUTERS, Router

__all__ = ["ROUTERS", "Router"]
