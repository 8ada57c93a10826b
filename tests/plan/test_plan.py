"""The command: a plan of the emulated CPU devices, its report, and one line for what cannot be planned."""

import json

import jax
import pytest

import moe_jax.plan.__main__ as command
from moe_jax import cli
from moe_jax.config import ConfigError
from moe_jax.models.flops import forward_flops_per_token
from moe_jax.plan import report, topology
from moe_jax.plan.roofline import CHIPS, Chip
from moe_jax.plan.step import make_plan, vocabulary
from moe_jax.plan.topology import Topology
from moe_jax.train.step import abstract_batch
from tests.train.small import make_batch, make_config

CONFIG = """
from moe_jax import config as c


def get_config():
    config = c.Config()
    config.model.moe.experts = 8
    return config
"""


def cpu_slice(chip: Chip = CHIPS["v5e"]) -> Topology:
    return Topology("v5e:2x4", chip, 8, jax.devices())


@pytest.fixture(scope="module")
def config():
    config = make_config(model__pattern="dense", model__layers=2, model__remat=True, train__microbatches=2)
    config.data.tokenizer, config.mesh.fsdp = "bytes", 4
    return config


@pytest.fixture(scope="module")
def plan(config):
    return make_plan(config, cpu_slice())


def test_every_product_is_counted(config, plan):
    """FLOPs equal the model's count, the other half of S x S included, which XLA's attention computes."""
    assert vocabulary(config) == 257 and plan.mesh == {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}
    c, s, tokens = config.model, config.data.sequence_length, plan.tokens / 8
    forward = forward_flops_per_token(c, 257, s)
    upper = c.layers * 2 * s * c.width
    # w_out is not computed again: no gradient needs its result.
    again = forward - 2 * c.width * 257 - c.layers * 2 * c.width * c.ffn_width
    assert plan.model_flops == 3 * forward * tokens
    assert plan.expected_flops == (3 * forward + again) * tokens
    executed = (3 * forward + again + 4 * upper) * tokens
    assert plan.flops == plan.compared_flops == pytest.approx(executed, rel=0.001)
    assert plan.unknown_loops == ()


def test_memory_and_links(config, plan):
    state = 4 * 3 * plan.parameters  # float32, with two moments
    assert state / 4 < plan.memory["arguments"] < state / 2  # over fsdp=4; norms and the odd vocabulary are whole
    assert plan.memory["aliased"] > 0.9 * plan.memory["output"] and plan.peak > plan.memory["arguments"]
    assert {c.axes for c in plan.collectives} <= {"fsdp", "data", "data+fsdp"}
    # The smallest exchange there can be: every weight's gradient crosses `data`, a quarter on each device.
    assert plan.link_bytes > plan.parameters  # 4 bytes / 4 shards, 2 (n - 1) / n = 1


def test_report(plan):
    text = report.to_text(plan)
    for part in (
        "memory of a chip",
        "FLOPs of a chip",
        "kernels: none",
        "all-reduce",
        "roofline",
        "tokens/s",
        "v5e",
    ):
        assert part in text
    found = json.loads(json.dumps(report.to_dict(plan)))
    assert found["memory"]["peak"] == plan.peak and found["roofline"]["bound"] == plan.times.bound
    assert found["flops"]["model"] == plan.model_flops and found["mesh"]["fsdp"] == 4
    table = report.ranking([plan], [(plan.mesh, "too large")])
    assert table.count("data=2 fsdp=4") == 2 and "too large" in table


def test_too_large_is_one_line(config, plan):
    for hbm, what in ((plan.peak - 1, "temporaries"), (1000, "the parameters and the optimizer alone")):
        small = Chip(1e12, hbm, 1e9, 1e9, "")
        with pytest.raises(ConfigError, match=what) as error:
            make_plan(config, cpu_slice(small)) if hbm == 1000 else _analyse_again(config, plan, small)
        assert "\n" not in str(error.value) and "microbatches" in str(error.value)


def _analyse_again(config, plan, chip):
    """The check after compiling, without compiling again."""
    from moe_jax.plan import step

    class Compiled:
        def memory_analysis(self):
            class Sizes:
                argument_size_in_bytes, output_size_in_bytes = plan.memory["arguments"], plan.memory["output"]
                alias_size_in_bytes, temp_size_in_bytes = plan.memory["aliased"], plan.memory["temporaries"]
                generated_code_size_in_bytes = plan.memory["program"]

            return Sizes

        def as_text(self):
            return "ENTRY %main (x: f32[]) -> f32[] {\n}\n"

    return step.analyse(config, cpu_slice(chip), Compiled(), 0.0)


def test_the_abstract_batch_is_a_real_one(config):
    from moe_jax.parallel.mesh import mesh_from_config

    batch = abstract_batch(config, mesh_from_config(config.mesh))
    real = make_batch(0)
    assert {n: (a.shape, a.dtype) for n, a in batch.items()} == {n: (a.shape, a.dtype) for n, a in real.items()}


def run(capsys, tmp_path, *arguments):
    """(exit code, stdout, stderr)."""
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.run(command.main, ["plan", f"--config={path}", *arguments], flags=command.define_flags, workdir=False)
    return exit.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ((), ("--topology", "not given")),
        (("--topology=v5p",), ("--topology=v5p", "v5e:2x4")),
        (("--topology=v9:2x2",), ("no chip 'v9'",)),
        (("--topology=v5p:2x2x2", "--workdir=x"), ("--workdir",)),
        (("--topology=v5e:2x4", "--config.mesh.fsdp=3"), ("mesh.fsdp", "3")),
        (("--topology=v5e:2x4", "--search", "--axes=model"), ("--axes=model",)),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(topology, "wrong_libtpu", lambda: "")
    monkeypatch.setattr(topology.compat, "tpu_topology", lambda name, **options: jax.devices())
    code, out, err = run(capsys, tmp_path, *arguments)
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if not line.endswith("...")]
    assert len(lines) == 1 and all(part in lines[0] for part in ("error: ", *parts)), err


def test_without_libtpu(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    code, out, err = run(capsys, tmp_path, "--topology=v5p:2x2x2")
    assert code == 2 and err.count("\n") == 1 and "pip install -e '.[tpu]'" in err


def test_a_refusing_compiler(capsys, tmp_path, monkeypatch):
    def refuse(name, **options):
        raise RuntimeError(f"INVALID_ARGUMENT: {name} is no shape\nwith more lines")

    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(topology.compat, "tpu_topology", refuse)
    code, out, err = run(capsys, tmp_path, "--topology=v5e:3x3")
    assert code == 2 and err.count("\n") == 1 and "is no shape" in err


@pytest.mark.parametrize("have, fine", [("0.0.42.1", True), ("0.0.42", True), ("0.0.421", False), ("0.0.52", False)])
def test_another_libtpu_is_named(monkeypatch, have, fine):
    monkeypatch.setattr(topology.importlib.metadata, "version", lambda name: have)
    monkeypatch.setattr(topology.importlib.metadata, "requires", lambda name: ["numpy", 'libtpu==0.0.42.*; extra == "tpu"'])
    assert topology.wrong_libtpu() == "" if fine else "libtpu==0.0.42.*" in topology.wrong_libtpu()
