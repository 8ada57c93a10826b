import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.compat import PartitionSpec as P
from moe_jax.config import MeshConfig
from moe_jax.parallel.mesh import mesh_from_config
from moe_jax.parallel.rules import batch_sharding, local_rows, partition_spec, put_batch, shardings_of


@pytest.fixture(scope="module")
def mesh():
    return mesh_from_config(MeshConfig(fsdp=2, expert=2, tensor=2))


@pytest.mark.smoke
@pytest.mark.parametrize(
    "shape, names, spec",
    [
        ((4, 8, 6), ("experts", "embed", "mlp"), P("expert", "fsdp", "tensor")),
        ((3, 4, 8), ("layers", "embed", "mlp"), P(None, "fsdp", "tensor")),
        ((257, 8), ("vocab", "embed"), P(None, "fsdp")),  # 2 does not divide 257
        ((8,), ("norm",), P(None)),
    ],
)
def test_partition_spec(mesh, shape, names, spec):
    assert partition_spec("a/b", shape, names, mesh) == spec


def test_two_dimensions_cannot_share_an_axis(mesh):
    with pytest.raises(ValueError, match="a/b"):
        partition_spec("a/b", (4, 4), ("mlp", "heads"), mesh)


def test_leaves_without_names_are_whole(mesh):
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4, 8), jnp.float32), ("embed", "mlp"))
    shardings = shardings_of({"w": box, "load": jax.ShapeDtypeStruct((8,), jnp.float32)}, mesh)
    assert shardings["w"].spec == P("fsdp", "tensor") and shardings["load"].is_fully_replicated


@pytest.mark.parametrize("batch_size, split", [(8, True), (6, False)])
def test_batch(mesh, batch_size, split):
    array = np.arange(batch_size * 3, dtype=np.int32).reshape(batch_size, 3)
    rows = local_rows(mesh, batch_size)
    placed = put_batch({"tokens": array[rows]}, mesh, batch_size)["tokens"]
    assert rows == slice(0, batch_size) and np.array_equal(placed, array)
    assert placed.sharding.is_equivalent_to(batch_sharding(mesh, batch_size), 2)
    assert placed.sharding.is_fully_replicated != split
    assert placed.addressable_shards[0].data.shape == ((batch_size // 4 if split else batch_size), 3)
