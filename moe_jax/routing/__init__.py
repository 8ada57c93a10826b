"""Routers, one file each, and what they share."""

from moe_jax.routing.contract import Router, Sizes, Step
from moe_jax.routing.registry import ROUTERS, register_router

__all__ = ["ROUTERS", "Router", "Sizes", "Step", "register_router"]
