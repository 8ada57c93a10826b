"""Routers, one file each, and what they share."""

from moe_jax.routing.contract import Router, Sizes, Step
from moe_jax.routing.registry import ROUTERS, SELECTORS, register_router

__all__ = ["ROUTERS", "SELECTORS", "Router", "Sizes", "Step", "register_router"]
