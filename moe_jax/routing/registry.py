"""Name -> router. The rows are the fields of `RoutersConfig`, the routers the files of this folder with these names."""

import importlib

from moe_jax.config.routers import ROUTER_NAMES
from moe_jax.routing.contract import Router

ROUTERS: dict[str, Router] = {name: importlib.import_module(f"moe_jax.routing.{name}").ROUTER for name in ROUTER_NAMES}
