"""Compiled for TPU slices that are not there; skipped where libtpu is not installed (`pip install -e '.[tpu]'`).

Each in a process of its own, without this suite's compiler settings.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

DRIVER = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from moe_jax import cli
from moe_jax.config.load import load_config
from moe_jax.plan import hlo, report, step, topology, traffic

config = cli.apply_overrides(load_config(sys.argv[1]), sys.argv[3:])
slice = topology.open_topology(sys.argv[2])
compiled, seconds = step.compile_step(config, slice)
arrays = sorted(str(a) for a in traffic.arrays(hlo.parse(compiled.as_text())))
print(json.dumps(report.to_dict(step.analyse(config, slice, compiled, seconds)) | {"arrays": arrays}))
"""

SMALL = """
from moe_jax import config as c


def get_config():
    config = c.Config()
    config.data.batch_size, config.data.sequence_length = 16, 256
    config.model.layers, config.model.pattern, config.model.dtype = 2, "routed", "bfloat16"
    config.model.width, config.model.heads, config.model.head_width = 256, 2, 128
    config.model.moe.experts, config.model.moe.expert_width = 8, 256
    return config
"""


def plan(config, topology, *overrides):
    """The plan of a config file, with the arrays of the program."""
    command = [sys.executable, "-c", DRIVER, str(config), topology, *overrides]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_a_billion_parameters_on_eight_chips(topology):
    """The grouped kernel and flash attention are in, nothing is expanded over experts, and no chip is full."""
    found = plan(ROOT / "configs" / "routed_1b.py", topology)
    assert 0.8e9 < found["parameters"] < 1.2e9 and found["chips"] == found["devices"] == 8
    assert {"grouped_matmul", "attention"} <= {kernel["kind"] for kernel in found["kernels"]}
    flops = found["flops"]
    assert flops["program_compared"] == pytest.approx(flops["model_with_recomputation"], rel=0.05)
    tokens, experts, k = 256 * 2048 // 8 // 8, 32, 4
    for array in found["arrays"]:
        dims = [int(n) for n in array[array.index("[") + 1 : -1].split(",") if n]
        rows = [n for n in dims if n in (tokens, tokens * k)]
        others = [n for n in dims if n > 1]
        assert not (rows and experts in dims and len(others) > 2), array
    # One microbatch moves nothing over `fsdp` but weights, their gradients and a few sums.
    assert {c["axes"] for c in found["collectives"]} == {"fsdp"}
    assert found["memory"]["peak"] < 0.6 * found["memory"]["hbm"] and not found["unknown_loops"]
    assert 0 < found["roofline"]["mfu"] < 1


def test_stablemoe():
    """An expert on each chip, its stack in the grouped kernel; no chip is full. The large model takes longer to compile."""
    found = plan(ROOT / "configs" / "stablemoe_lm_base.py", "v5p:2x4x4")
    assert found["chips"] == found["devices"] == 32
    assert "grouped_matmul" in {kernel["kind"] for kernel in found["kernels"]}
    assert found["memory"]["peak"] < 0.6 * found["memory"]["hbm"]
    assert found["flops"]["program_compared"] == pytest.approx(found["flops"]["model_with_recomputation"], rel=0.05)


@pytest.mark.parametrize("topology", ["v5e:2x4", "v4:2x2x2"])
def test_the_exchange_sends_what_it_says(tmp_path, topology):
    """A routed layer gathers x, ids and gates and scatters y over `expert`; its gradient does the reverse."""
    config = tmp_path / "config.py"
    config.write_text(SMALL)
    found = plan(config, topology, "--config.mesh.expert=4", "--config.mesh.fsdp=2")
    layers = 2
    counts = {
        (c["kind"], c["scope"]): (c["axes"], c["count"]) for c in found["collectives"] if c["scope"].startswith("exchange")
    }
    assert counts == {
        ("all-gather", "exchange"): ("expert", 3 * layers),
        ("reduce-scatter", "exchange"): ("expert", 1 * layers),
        ("all-gather", "exchange backward"): ("expert", 1 * layers),
        ("reduce-scatter", "exchange backward"): ("expert", 2 * layers),
    }
    assert "grouped_matmul" in {kernel["kind"] for kernel in found["kernels"]}


def test_the_command_as_a_user_runs_it(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(SMALL)

    def run(*arguments):
        command = [sys.executable, "-m", "moe_jax.plan", f"--config={config}", *arguments]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)

    result = run("--topology=v5e:3x5")
    assert result.returncode == 2 and result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    result = run("--topology=tpu7x:2x2x1", "--config.mesh.fsdp=8")
    assert result.returncode == 0 and "4 chips of 2 devices" in result.stdout, result.stderr
    assert "ragged-dot" in result.stdout or "gmm" in result.stdout


def test_a_retrieval_moves_what_it_retrieves(tmp_path):
    """On one chip: two kernels, which read T R experts and not the pool.

    To 2%: bytes of rows, and of x, y, ids, gates and what else a kernel reads and writes for each pair.
    """
    config = tmp_path / "config.py"
    config.write_text(SMALL)
    tokens, pairs, width, rows = 16 * 256, 32, 256, 2
    retrieving = ("--config.model.pattern=dense", "--config.model.inserts=middle=peer@1", "--config.model.dtype=float32")
    peer = {"heads": 4, "top_k": 8, "key_width": 128}
    retrieving += tuple(f"--config.model.peer.{name}={value}" for name, value in peer.items())
    found = plan(config, "v5e:1x1", *retrieving, f"--config.model.peer.experts={256**2}")
    kernels = [kernel for kernel in found["kernels"] if kernel["kind"] == "retrieval"]
    assert sum(kernel["count"] for kernel in kernels) == 2
    forward = tokens * pairs * (rows * width * 4 + 4 * (2 + (rows - 1)))
    backward = tokens * pairs * (rows * width * 4 + 4 * (2 + (rows - 1) + 1 + rows))
    assert found["retrieved_bytes"] == pytest.approx(forward + backward + 4 * tokens * width * 4, rel=0.02)
    assert sum(kernel["flops"] for kernel in kernels) == 2 * 2 * tokens * pairs * rows * width
    # Of four times the pool the rows are as many. The router's keys grow with the root of N; what is added to the pool is not
    # passed over even once.
    larger = plan(config, "v5e:1x1", *retrieving, f"--config.model.peer.experts={512**2}")
    assert larger["retrieved_bytes"] == found["retrieved_bytes"] < found["hbm_bytes"]
    assert larger["hbm_bytes"] - found["hbm_bytes"] < (512**2 - 256**2) * rows * width * 4
