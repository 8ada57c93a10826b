"""A trained run, ready for evaluation and generation on any mesh."""

from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax

from moe_jax.config import Config, ConfigError, from_dict
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.models import MODELS
from moe_jax.parallel.mesh import mesh_from_config, start_devices
from moe_jax.train.checkpoint import Checkpoints, DamagedCheckpointError, load_meta
from moe_jax.train.frozen import frozen_paths
from moe_jax.train.state import abstract_placed_variables


class LoadedRun(NamedTuple):
    """What evaluation and generation need of a run.

    variables: {"params", "router_state"}, placed on `mesh`; the averaged parameters where the run keeps an
    average. step: of the checkpoint. meta: the checkpoint's description.
    """

    config: Config
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    model: nn.Module
    variables: dict[str, Any]
    step: int
    meta: dict[str, Any]


def load_run(workdir, config: Config, step: int | None = None) -> LoadedRun:
    """Restores the parameters of a run, but not its optimizer's state, onto the mesh of `config`.

    Args:
      workdir: of the run; local or gs:// path.
      config: the run's, whose mesh, kernels, dtype and `scan` may differ from those it was trained with.
        `optimizer.ema_decay=0` takes the parameters themselves where the run keeps an average of them.
      step: of the checkpoint; None: the newest.

    Raises:
      ConfigError: no checkpoint, none that can be read, one of another model, or a mesh that the devices do
        not fill.
    """
    start_devices(config.mesh)
    mesh = mesh_from_config(config.mesh)
    try:
        meta = load_meta(workdir, step)
        tokenizer = Tokenizer.from_json(meta["tokenizer"])
        model = MODELS[config.model.name](config.model, tokenizer.vocab_size)
        averaged = from_dict(meta["config"]).optimizer.ema_decay > 0 and config.optimizer.ema_decay > 0
        with jax.set_mesh(mesh), Checkpoints(workdir, read_only=True) as checkpoints:
            target = abstract_placed_variables(model, mesh)
            variables, step = _restore_variables(checkpoints, step, target, from_dict(meta["config"]), averaged)
    except DamagedCheckpointError as error:
        raise ConfigError("--workdir", str(workdir), str(error), "name another --step or --workdir") from error
    return LoadedRun(config, mesh, tokenizer, model, variables, step, meta)


def _restore_variables(
    checkpoints: Checkpoints, step: int | None, target: dict[str, Any], saved: Config, averaged: bool
) -> tuple[dict[str, Any], int]:
    """The arrays of `target` {"params", "router_state"} and their step; with `averaged`, averages in place of what has one."""
    params = flax.traverse_util.flatten_dict(target["params"], sep="/")
    frozen = frozen_paths(saved.optimizer, params)  # which the average leaves out
    place = {path: f"ema/{path}" if averaged and path not in frozen else f"params/{path}" for path in params}
    wanted = flax.traverse_util.unflatten_dict({place[path]: leaf for path, leaf in params.items()}, sep="/")
    kept = {"router_state", "params", "ema"} if averaged else {"router_state", "params"}

    def ignore(path):
        key, _, rest = path.partition("/")
        return key not in kept or (key != "router_state" and rest in params)  # the other form of a parameter that is read

    restored = checkpoints.restore(wanted | {"router_state": target["router_state"]}, step, ignore=ignore)
    arrays = flax.traverse_util.flatten_dict(restored.state, sep="/")
    tree = flax.traverse_util.unflatten_dict({path: arrays[place[path]] for path in params}, sep="/")
    return {"params": tree, "router_state": restored.state["router_state"]}, restored.step
