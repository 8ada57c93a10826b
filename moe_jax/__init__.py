"""Mixture-of-experts language models in JAX."""

import importlib

_HOMES = {
    "Aux": "moe_jax.types",
    "MoE": "moe_jax.layers.moe",
    "PEER": "moe_jax.layers.peer",
    "Router": "moe_jax.routing",
    "RouterInputs": "moe_jax.types",
    "TokenChoice": "moe_jax.types",
    "Step": "moe_jax.routing",
    "register_router": "moe_jax.routing",
    "grouped_matmul": "moe_jax.ops.grouped_matmul",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Public names load on first use: a command answers --help and a typo without loading JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
