import jax
import pytest

from moe_jax.compat import AxisType
from moe_jax.config import ConfigError, MeshConfig
from moe_jax.parallel.mesh import mesh_from_config


def test_data_takes_what_is_left():
    mesh = mesh_from_config(MeshConfig(expert=4))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes", [{"data": 1, "expert": 4}, {"expert": 3}, {"data": 2, "fsdp": 8}])
def test_a_product_that_is_not_the_device_count_is_refused(sizes):
    with pytest.raises(ConfigError, match="the product must be the device count, 8") as error:
        mesh_from_config(MeshConfig(**sizes), jax.devices())
    assert "\n" not in str(error.value)
