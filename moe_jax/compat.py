"""The only place that touches moving JAX APIs: meshes, shard_map and its varying axes, Pallas, TPU topologies."""

import importlib
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

# The mesh axes that split the batch.
BATCH_AXES = ("data", "fsdp", "expert")


def make_mesh(devices, axis_names: tuple[str, ...], axis_sizes: tuple[int, ...]) -> Mesh:
    """A mesh of Auto axes over `devices`, in the order that JAX finds best for their links.

    `jax.make_mesh` defaults to Explicit axes and `Mesh` to Auto ones, so the type is always given.
    """
    types, devices = (AxisType.Auto,) * len(axis_names), np.asarray(devices).ravel().tolist()
    return jax.make_mesh(axis_sizes, axis_names, axis_types=types, devices=devices)


def current_mesh():
    """The abstract mesh set by `jax.set_mesh`, or None when there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh is None or mesh.empty else mesh


def refuse_explicit_axes(what: str) -> None:
    """Layers that place their work themselves need Auto axes.

    Raises:
      ValueError: the current mesh has Explicit ones.
    """
    mesh = current_mesh()
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"{what} under a mesh of Explicit axes {mesh.axis_names}: make the mesh with "
            "axis_types=(jax.sharding.AxisType.Auto,) * n, or wrap the call in jax.sharding.auto_axes"
        )


def target_platform() -> str:
    """Platform that the traced program is for: of the mesh set by `jax.set_mesh`, else JAX's default.

    An ahead-of-time compilation for a TPU topology on a CPU machine says "tpu" here.
    """
    device = getattr(current_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def for_platform(values: Mapping[str, int]) -> int:
    """The entry of `target_platform`, or "other"."""
    return values.get(target_platform(), values["other"])


def tpu_topology(name: str, **options) -> list:
    """The devices of a TPU slice that need not be there, such as "v5p:2x2x2", for compiling ahead of time with libtpu.

    Args:
      name: the slice.
      options: of the compiler, such as chip_config_name="megacore".

    Raises:
      RuntimeError: libtpu is missing, or knows no such slice.
    """
    # No questions to a metadata server or about this machine, and no claim on a TPU or on libtpu's lock file.
    defaults = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
    }
    for variable, value in defaults.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(name, "tpu", **options).devices)


def pallas(part: str = ""):
    """The module of Pallas, or its `part` "triton" (NVIDIA) or "tpu"; imported at the first use, which takes a second."""
    return importlib.import_module(".".join(filter(None, ("jax.experimental.pallas", part))))


def axis_size(mesh, *names: str) -> int:
    """Product of the sizes of those of `names` that `mesh` has; 1 without a mesh."""
    size = 1
    for name in names:
        size *= mesh.shape.get(name, 1) if mesh is not None else 1
    return size


def inside_shard_map(mesh) -> bool:
    """Whether the code is traced inside a shard_map over some axis of `mesh`."""
    return mesh is not None and any(kind == AxisType.Manual for kind in mesh.axis_types)


def constrain(array: jax.Array, *spec: tuple[str, ...]) -> jax.Array:
    """Asks for a sharding under a mesh of Auto axes; axes that it lacks or that do not divide are left out.

    Args:
      array: of any shape.
      spec: for each dimension the mesh axes that split it, or an empty tuple.
    """
    mesh = current_mesh()
    if mesh is None or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return array
    parts = [tuple(name for name in names if name in mesh.shape) or None for names in spec]
    parts = [
        names if names is None or size % axis_size(mesh, *names) == 0 else None
        for names, size in zip(parts, array.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*parts))


def shard_map(f, mesh, in_specs, out_specs, check: bool = True):
    """`jax.shard_map` over all axes of `mesh`.

    check: its replication checks. Pallas kernels do not pass them; without them an output that is said to be the same on
    all shards, and is not, silently becomes shard 0's.
    """
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check)


def varying_axes(*arrays) -> frozenset[str]:
    """Mesh axes over which any of `arrays` varies inside a shard_map; empty outside."""
    axes: frozenset[str] = frozenset()
    for array in arrays:
        axes |= jax.typeof(array).manual_axis_type.varying
    return axes


def vary(array, axes: frozenset[str]):
    """`array`, typed as varying over `axes` too. Its gradient is then summed over the added axes."""
    missing = tuple(sorted(axes - varying_axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def vary_alike(*arrays):
    """All `arrays`, typed as varying over all their axes: what a custom_vjp and a loop carry need."""
    axes = varying_axes(*arrays)
    return tuple(vary(array, axes) for array in arrays)


def zeros(shape, dtype, like) -> jax.Array:
    """Zeros that vary over the same mesh axes as `like`, fit to be a loop carry."""
    return vary(jnp.zeros(shape, dtype), varying_axes(like))


def empty(shape, dtype, like) -> jax.Array:
    """An array that holds anything, NaN included, and varies over the same mesh axes as `like`: for a loop that writes all
    that is read."""
    return vary(jax.lax.empty(shape, dtype), varying_axes(like))


def argsort(x: jax.Array) -> jax.Array:
    """Stable argsort of [M], int32.

    `jnp.argsort` (jax 0.10.2 and 0.12.0) types its result as the same on all shards of a shard_map even
    where `x` varies; residuals of a gradient then silently take shard 0's value.
    """
    return jax.lax.sort((x, jnp.arange(x.shape[0], dtype=jnp.int32)), num_keys=1, is_stable=True)[1]


__all__ = [
    "AxisType",
    "BATCH_AXES",
    "Mesh",
    "PartitionSpec",
    "argsort",
    "axis_size",
    "constrain",
    "current_mesh",
    "empty",
    "for_platform",
    "inside_shard_map",
    "make_mesh",
    "pallas",
    "refuse_explicit_axes",
    "shard_map",
    "target_platform",
    "tpu_topology",
    "vary",
    "vary_alike",
    "varying_axes",
    "zeros",
]
