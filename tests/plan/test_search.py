import math

import pytest

from moe_jax.config import Config, ConfigError
from moe_jax.parallel.mesh import AXES
from moe_jax.plan.search import meshes, splits


def sizes(config):
    return tuple(getattr(config.mesh, name) for name in AXES)


@pytest.mark.smoke
def test_splits():
    assert sorted(splits(4, 2)) == [(1, 4), (2, 2), (4, 1)]
    found = list(splits(8, 4))
    assert len(found) == len(set(found)) == 20 and {math.prod(s) for s in found} == {8}


def test_only_meshes_that_the_config_allows():
    config = Config()  # 4 heads, 8 experts, a batch of 16
    config.mesh.cpu_devices = 2
    found = [sizes(c) for c in meshes(config, 8)]
    assert (1, 1, 8, 1) in found and (1, 1, 1, 8) not in found  # 8 shards do not divide 4 heads
    assert {math.prod(s) for s in found} == {8} and len(set(found)) == len(found) == 19
    assert sizes(config) == (-1, 1, 1, 1) and config.mesh.cpu_devices == 2


def test_fixed_axes_stay():
    config = Config()
    config.mesh.data, config.mesh.tensor = 1, 2
    assert sorted(sizes(c) for c in meshes(config, 8, ("fsdp", "expert"))) == [(1, 1, 4, 2), (1, 2, 2, 2), (1, 4, 1, 2)]
    config.mesh.data = -1  # what the others leave
    assert sorted(sizes(c) for c in meshes(config, 8, ("fsdp",))) == [
        (1, 4, 1, 2),
        (2, 2, 1, 2),
        (4, 1, 1, 2),
    ]


@pytest.mark.parametrize(
    "axes, data, match",
    [(("model",), 1, "no mesh axis"), (("fsdp",), 3, "do not divide")],
)
def test_bad_axes(axes, data, match):
    config = Config()
    config.mesh.data = data
    with pytest.raises(ConfigError, match=match):
        meshes(config, 8, axes)


def test_a_config_that_no_mesh_fits():
    config = Config()
    config.data.batch_size = 3
    with pytest.raises(ConfigError, match="batch_size"):
        meshes(config, 8, ("data", "fsdp"))
