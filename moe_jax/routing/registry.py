"""The tables of routers, each the `ROUTER` of the file with that name in this folder.

`ROUTERS`, of routed layers, has one for each field of `RoutersConfig`. `SELECTORS`, of layers that retrieve, has one for each
choice of `PeerConfig.selector`; their options are the `PeerConfig` itself.
"""

import importlib

from moe_jax.config.routers import ROUTER_NAMES, RouterOptions, register_options
from moe_jax.routing import product_keys, token_hash
from moe_jax.routing.contract import Router

ROUTERS: dict[str, Router] = {name: importlib.import_module(f"moe_jax.routing.{name}").ROUTER for name in ROUTER_NAMES}
SELECTORS: dict[str, Router] = {"product_keys": product_keys.ROUTER, "token_hash": token_hash.ROUTER}


def register_router(name: str, options: type[RouterOptions], router: Router) -> None:
    """Adds a router from outside the package to every command and to `model.moe.router`.

    A config names the module that calls this in `plugins`, so that a run's folder can be read again.

    Args:
      name: an identifier; `model.moe.routers.NAME` has its options.
      options: a dataclass under `moe_jax.config.RouterOptions` whose fields are made by `moe_jax.config.field`.
      router: what it does.

    Raises:
      ValueError: the name is taken by another router, or `options` is something else.
    """
    register_options(name, options)
    ROUTERS[name] = router
