"""Which mesh axis each logical axis of a parameter is split over: the one table, read where parameters are placed and where a
layer's shard_map takes them apart."""

from moe_jax.compat import PartitionSpec

# Logical axis -> mesh axis. What is not named here is not split.
RULES = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "retrieved_width": "expert",
}


def mesh_axis(name: str | None) -> str | None:
    """The mesh axis of a logical axis; None: it is not split."""
    return RULES.get(name) if name else None


def mesh_spec(mesh, names: tuple[str | None, ...]) -> PartitionSpec:
    """How a parameter with these logical axes is split over those axes that `mesh` has."""
    return PartitionSpec(*(axis if axis in mesh.shape else None for axis in map(mesh_axis, names)))
