"""From the config to a device mesh."""

import math
import os
from collections.abc import Mapping

import jax
import numpy as np

from moe_jax import compat
from moe_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "expert", "tensor")


def start_devices(config: MeshConfig) -> None:
    """Emulates CPU devices if the config asks, and joins the other processes where the environment names them.

    Call it before anything else asks JAX for devices. A job is joined if COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID
    are set, or in a Slurm step or an Open MPI job of several processes and on several TPU hosts.

    Raises:
      ConfigError: COORDINATOR_ADDRESS without the other two, or with values that cannot be.
    """
    if config.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    if jax.distributed.is_initialized():
        return
    if "COORDINATOR_ADDRESS" in os.environ:
        processes = _number("NUM_PROCESSES", 1)
        number = _number("PROCESS_ID", 0, processes - 1)
        jax.distributed.initialize(os.environ["COORDINATOR_ADDRESS"], processes, number)
    elif _in_cluster(os.environ):
        jax.distributed.initialize()


def _number(name: str, low: int, high: int | None = None) -> int:
    """An environment variable's integer."""
    text, field = os.environ.get(name), f"environment variable {name}"
    if text is None:
        fix = "set it for every process, or unset COORDINATOR_ADDRESS"
        raise ConfigError(field, None, "not set, though COORDINATOR_ADDRESS is", fix)
    if not text.isdecimal() or not low <= int(text) <= (math.inf if high is None else high):
        limit = f"not an integer from {low}" + ("" if high is None else f" to NUM_PROCESSES - 1 = {high}")
        raise ConfigError(field, text, limit, "set it to one")
    return int(text)


def _in_cluster(env: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows started this process beside others."""

    def several(name):
        return env.get(name, "1") not in ("", "0", "1")

    # The count alone is there in a batch script too, which is no step and runs once.
    step = all(name in env for name in ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"))
    return (
        (step and several("SLURM_NTASKS"))
        or several("OMPI_COMM_WORLD_SIZE")
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    )


def mesh_from_config(config: MeshConfig, devices=None) -> compat.Mesh:
    """A mesh with the axes data, fsdp, expert, tensor over all devices (or the given ones).

    Raises:
      ConfigError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in AXES}
    given = math.prod(size for size in sizes.values() if size > 0)
    if config.data == -1 and len(devices) % given == 0:
        sizes["data"] = len(devices) // given
    if math.prod(sizes.values()) != len(devices):
        shape = ", ".join(f"{name}={size}" for name, size in sizes.items())
        limit = f"the product must be the device count, {len(devices)}"
        raise ConfigError("mesh", shape, limit, "change an axis, or set mesh.data=-1 to take what the others leave")
    return compat.make_mesh(np.asarray(devices), AXES, tuple(sizes.values()))
