"""What may stand in a config: types, ranges and combinations, checked before anything is traced.

Rules that need the devices' kind (attention kernels), the data on disk or a checkpoint are checked where
those are opened; they raise `ConfigError` too.
"""

import os
from typing import Any

from moe_jax.config.reflect import leaves
from moe_jax.config.run import Config
from moe_jax.config.validate.data import check_data
from moe_jax.config.validate.limits import check_limits, validate_types
from moe_jax.config.validate.model import check_attention, check_blocks, check_feed_forward
from moe_jax.config.validate.run import check_curriculum, check_mesh, check_optimizer, check_run


def validate(config: Any, device_count: int | None = None) -> None:
    """Checks every leaf's type and value, and every combination of fields.

    An int in a float field becomes a float, and a list of sources or groups a tuple; nothing else is changed.

    Args:
      config: a `moe_jax.config.Config`.
      device_count: how many devices the mesh is laid over; None: `mesh.cpu_devices` where that is set, else
        not known yet, and only what holds for any number is checked.

    Raises:
      ConfigError: one line with the field, its value, the limit and the fix.
    """
    validate_types(config)
    for path, owner, leaf in leaves(config):
        check_limits(path, getattr(owner, leaf.name), leaf.metadata)
    check_data(config.data)
    check_blocks(config.model)
    check_attention(config)
    check_feed_forward(config)
    check_curriculum(config)
    check_mesh(config, device_count or _emulated_devices(config) or None)
    check_optimizer(config)
    check_run(config)


def _emulated_devices(config: Config) -> int:
    """Devices that the config asks to emulate, over all processes that the environment announces."""
    processes = os.environ.get("NUM_PROCESSES", "1")
    return config.mesh.cpu_devices * (int(processes) if processes.isdigit() else 1)
