"""The training state: one dict of arrays, placed on the mesh, with everything a restart needs.

Keys: params, router_state, opt_state {dense, rows}, step, skipped, skipped_in_row, and ema if the config keeps one.
Parameters that the config freezes have no leaf in opt_state and ema.
"""

import math
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.config import Config
from moe_jax.models.decoder import sink_tables
from moe_jax.parallel.rules import replicated, shardings_of
from moe_jax.train.frozen import frozen_paths
from moe_jax.train.optimizer import make_optimizer
from moe_jax.train.row_update import init_rows, state_like

State = dict[str, Any]


def abstract_variables(model: nn.Module) -> dict[str, Any]:
    """ShapeDtypeStructs of `params` and `router_state`, boxed with their logical axes."""
    return jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))


def init_variables(model: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Fresh `params` and `router_state`, boxed with their logical axes."""
    token = jnp.zeros((1, 1), jnp.int32)
    return {"router_state": {}} | dict(model.init(key, token, token, token + 1))


def table_paths(config: Config) -> frozenset[str]:
    """Paths in `params` of the tables with row-wise gradients."""
    return frozenset(sink_tables(config.model).values())


def split_params(config: Config, params: Any) -> tuple[Any, dict[str, Any]]:
    """The parameters that learn, by the form of their gradients; those that `config.optimizer` freezes are in neither.

    Returns:
      (a tree of those with dense gradients, {path: table} of those with row-wise ones).
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    frozen = frozen_paths(config.optimizer, flat)
    dense = {path: leaf for path, leaf in flat.items() if path not in frozen}
    tables = {path: dense.pop(path) for path in sorted(table_paths(config) - frozen)}
    return flax.traverse_util.unflatten_dict(dense, sep="/"), tables


def learned_params(config: Config, params: Any) -> Any:
    """The tree of the parameters that learn, without those that `config.optimizer` freezes."""
    return overlay(*split_params(config, params))


def overlay(tree: Any, *parts: Any) -> Any:
    """`tree`, nested dicts, with the leaves that `parts` have in place of its own."""
    flat = [flax.traverse_util.flatten_dict(part, sep="/") for part in (tree, *parts)]
    return flax.traverse_util.unflatten_dict({path: leaf for part in flat for path, leaf in part.items()}, sep="/")


def init_state(model: nn.Module, config: Config, key: jax.Array) -> State:
    """A state before its first step."""
    variables = nn.unbox(init_variables(model, key))
    dense, tables = split_params(config, variables["params"])
    state = {
        "params": variables["params"],
        "router_state": variables["router_state"],
        "opt_state": {
            "dense": make_optimizer(config.optimizer).init(dense),
            "rows": {path: init_rows(config.optimizer, table) for path, table in tables.items()},
        },
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
        "skipped_in_row": jnp.zeros((), jnp.int32),
    }
    if config.optimizer.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, learned_params(config, variables["params"]))
    return state


def state_shardings(model: nn.Module, config: Config, mesh) -> State:
    """A NamedSharding for every leaf of the state: moments lie where their parameters do, scalars on every device."""
    whole = replicated(mesh)
    variables = shardings_of(abstract_variables(model), mesh)
    shapes = jax.eval_shape(lambda: init_state(model, config, jax.random.key(0)))
    dense, tables = split_params(config, variables["params"])
    shardings = {
        "params": variables["params"],
        "router_state": variables["router_state"],
        "opt_state": {
            "dense": optax.tree_utils.tree_map_params(
                make_optimizer(config.optimizer),
                lambda _, sharding: sharding,
                shapes["opt_state"]["dense"],
                dense,
                transform_non_params=lambda _: whole,
            ),
            "rows": {path: state_like(config.optimizer, table, whole) for path, table in tables.items()},
        },
        "step": whole,
        "skipped": whole,
        "skipped_in_row": whole,
    }
    return shardings | ({"ema": learned_params(config, variables["params"])} if config.optimizer.ema_decay else {})


def place_state(model: nn.Module, config: Config, mesh) -> State:
    """`init_state` from `config.seed`, made on the mesh; the same values on every mesh."""
    shardings = state_shardings(model, config, mesh)
    key = jax.random.key(config.seed)
    # On a CPU compiling this once-run program takes seconds, 5 times as long as with LLVM's optimizations off.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    init = jax.jit(lambda: init_state(model, config, key), out_shardings=shardings, compiler_options=options)
    return init()


def abstract_state(model: nn.Module, config: Config, mesh) -> State:
    """ShapeDtypeStructs of the state with their shardings, as a restore wants them."""
    shapes = jax.eval_shape(lambda: init_state(model, config, jax.random.key(0)))
    return _placed(shapes, state_shardings(model, config, mesh))


def abstract_placed_variables(model: nn.Module, mesh) -> dict[str, Any]:
    """ShapeDtypeStructs of `params` and `router_state` with their shardings."""
    boxed = abstract_variables(model)
    return _placed(nn.unbox(boxed), shardings_of(boxed, mesh))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)


def total_bytes(tree: Any) -> int:
    """Bytes of all leaves (arrays or ShapeDtypeStructs), over all devices, each counted once."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
