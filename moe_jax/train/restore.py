"""A trained run, ready for evaluation and generation on any mesh."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax

from moe_jax.config import Config, ConfigError
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.models import MODELS
from moe_jax.parallel.mesh import mesh_from_config, start_devices
from moe_jax.train.checkpoint import DamagedCheckpointError, load_meta, load_params
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
        saved_ema = meta["config"]["optimizer"].get("ema_decay", 0.0) > 0
        name = "ema" if saved_ema and config.optimizer.ema_decay > 0 else "params"
        target = abstract_placed_variables(model, mesh)
        with jax.set_mesh(mesh):
            restored = load_params(workdir, {name: target["params"], "router_state": target["router_state"]}, step)
    except DamagedCheckpointError as error:
        raise ConfigError("--workdir", str(workdir), str(error), "name another --step or --workdir") from error
    variables = {"params": restored.state[name], "router_state": restored.state["router_state"]}
    return LoadedRun(config, mesh, tokenizer, model, variables, restored.step, meta)
