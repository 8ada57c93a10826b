import jax
import pytest

from moe_jax.compat import AxisType
from moe_jax.config import ConfigError, MeshConfig
from moe_jax.parallel.mesh import mesh_from_config, start_devices


@pytest.mark.smoke
def test_data_takes_what_is_left():
    mesh = mesh_from_config(MeshConfig(expert=4))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes", [{"data": 1, "expert": 4}, {"expert": 3}, {"data": 2, "fsdp": 8}])
def test_a_product_that_is_not_the_device_count_is_refused(sizes):
    with pytest.raises(ConfigError, match="the product must be the device count, 8") as error:
        mesh_from_config(MeshConfig(**sizes), jax.devices())
    assert "\n" not in str(error.value)


ADDRESS = {"COORDINATOR_ADDRESS": "localhost:1234"}
STEP = {"SLURM_STEP_NODELIST": "node", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture
def started(monkeypatch):
    """What `start_devices` hands to JAX in a given environment: a list of argument tuples."""
    for name in (*ADDRESS, *STEP, "NUM_PROCESSES", "PROCESS_ID", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))

    def start(env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        start_devices(MeshConfig())
        return calls

    return start


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, []),
        ({"SLURM_NTASKS": "1"}, []),
        ({"SLURM_NTASKS": "4"}, []),  # a batch script is no step
        ({"SLURM_NTASKS": "1"} | STEP, []),
        ({"SLURM_NTASKS": "4"} | STEP, [()]),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, [()]),
        ({"TPU_WORKER_HOSTNAMES": "one"}, []),
        ({"TPU_WORKER_HOSTNAMES": "one,two"}, [()]),
        (ADDRESS | {"NUM_PROCESSES": "2", "PROCESS_ID": "1"}, [("localhost:1234", 2, 1)]),
    ],
)
def test_joins_the_other_processes_where_there_are_some(started, env, expected):
    assert started(env) == expected


@pytest.mark.parametrize(
    "env, message",
    [
        ({}, "^environment variable NUM_PROCESSES: not set, though"),
        ({"NUM_PROCESSES": "2"}, "^environment variable PROCESS_ID: not set, though"),
        ({"NUM_PROCESSES": "two"}, "NUM_PROCESSES=two: not an integer from 1; "),
        ({"NUM_PROCESSES": "2", "PROCESS_ID": "2"}, "PROCESS_ID=2: not an integer from 0 to NUM_PROCESSES - 1 = 1"),
    ],
)
def test_an_incomplete_environment_is_refused(started, env, message):
    with pytest.raises(ConfigError, match=message):
        started(ADDRESS | env)
