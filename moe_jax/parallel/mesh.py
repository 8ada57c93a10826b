"""From the config to a device mesh."""

import math
import os

import jax
import numpy as np

from moe_jax import compat
from moe_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "expert", "tensor")


def start_devices(config: MeshConfig) -> None:
    """Emulates CPU devices if the config asks, and joins the other processes where the environment names them.

    Call it before anything else asks JAX for devices. A job is joined if COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID
    are set, or if JAX finds a cluster by itself (TPU pods, Slurm, Open MPI, Kubernetes).
    """
    if config.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    if jax.distributed.is_initialized():
        return
    if "COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            os.environ["COORDINATOR_ADDRESS"], int(os.environ["NUM_PROCESSES"]), int(os.environ["PROCESS_ID"])
        )
    elif any(
        name in os.environ
        for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_COORDINATOR_ADDRESS")
    ) or (len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1):
        jax.distributed.initialize()


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
        raise ConfigError(
            "mesh", shape, limit, "change an axis, or set mesh.data=-1 to take what the others leave"
        )
    return compat.make_mesh(np.asarray(devices), AXES, tuple(sizes.values()))
