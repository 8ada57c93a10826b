"""A router from outside the package, and feed-forward layers by name, through every command."""

import ast
import importlib
import json
import math
import pathlib
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax.evaluate.__main__ as evaluate
import moe_jax.report.__main__ as report
from moe_jax import cli, generate
from moe_jax import config as c
from moe_jax.config.flags import apply_overrides
from moe_jax.config.routers import ROUTER_NAMES, RoutersConfig
from moe_jax.config.validate import validate
from moe_jax.models.flops import block_flops, experts_run, forward_flops_per_token
from moe_jax.models.places import by_layer, places
from moe_jax.routing import ROUTERS, Router, register_router
from moe_jax.train import loop
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.metrics import read_metrics
from tests.train.small import Runner, make_batch, make_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = [
    # After a read that failed, TensorStore calls back into an event loop that Orbax has closed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def odd_router():
    """The plugin, for the tests of this file alone."""
    module = importlib.import_module("tests.odd_router")
    yield module
    ROUTERS.pop("odd")
    ROUTER_NAMES.remove("odd")
    del RoutersConfig.__dataclass_fields__["odd"]
    sys.modules.pop("tests.odd_router")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(loop, "show_log", lambda: None)
    monkeypatch.setattr(loop, "start_devices", lambda mesh: None)


def odd(**overrides) -> c.Config:
    config = make_config(model__layers=2, model__pattern="dense,routed", model__moe__router="odd", **overrides)
    config.model.moe.experts, config.plugins = 4, "tests.odd_router"
    return config


def named(**overrides) -> c.Config:
    """Three feed-forward layers: Switch, PEER, and routed ones of another size without attention or a norm, as an insert."""
    config = make_config(model__layers=4, model__pattern="switch,small_peer", model__inserts="between=free@2", **overrides)
    switch = c.MoEConfig(experts=4, top_k=1, router="switch", expert_width=16)
    peer = c.PeerConfig(experts=64, heads=2, top_k=4, key_width=8, share_pool=True)
    free = c.MoEConfig(experts=8, top_k=2, expert_width=8)
    free.routers.top_k.bias_rate = 0.01
    config.model.ffns = (
        c.FFNConfig("switch", kind="routed", moe=switch),
        c.FFNConfig("small_peer", kind="peer", peer=peer),
        c.FFNConfig("free", kind="routed", attention=False, norm=False, moe=free),
    )
    return config


def on_disk(config: c.Config, folder: pathlib.Path, steps: int) -> c.Config:
    """The same over files in `folder`."""
    (folder / "text").mkdir(exist_ok=True)
    for i in range(24):
        (folder / "text" / f"{i}.txt").write_text(f"document {i} " + f"word {i} " * 30)
    config.data.sources = (c.SourceConfig(name="words", files=f"{folder}/text/*.txt"),)
    config.data.tokenizer, config.data.cache_dir, config.data.held_out_percent = "bytes", f"{folder}/cache", 20.0
    config.train.steps, config.train.log_every, config.train.tensorboard, config.train.max_to_keep = steps, 1, False, 9
    return config


def leaves(workdir) -> dict:
    """Path -> fingerprint of all that the newest checkpoint holds."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        record = checkpoints._record(checkpoints.latest_step())
    return {path: leaf["fingerprint"] for path, leaf in record["leaves"].items()}


def run(capsys, module, workdir, *arguments, **options) -> str:
    """A command over a run's folder; what it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(module.main, ["x", f"--workdir={workdir}", *arguments], flags=module.define_flags, **options)
    out = capsys.readouterr()
    assert stop.value.code == 0, out.err
    return out.out


def through_every_command(config: c.Config, folder, capsys) -> tuple[dict, str]:
    """Trains 4 steps, and 2 + 2, to the same bits; then every other command. Returns the last row and the report."""
    config = on_disk(config, folder, 4)
    assert loop.fit(config, f"{folder}/whole") == 0
    config.train.steps = 2
    assert loop.fit(config, f"{folder}/parts") == 0
    config.train.steps = 4
    assert loop.fit(config, f"{folder}/parts") == 0
    assert leaves(f"{folder}/parts") == leaves(f"{folder}/whole")
    scores = json.loads(run(capsys, evaluate, f"{folder}/whole", config_from="workdir"))
    assert math.isfinite(scores["sources"]["words"]["loss"])
    run(capsys, report, f"{folder}/whole", config_from="workdir")
    rows = [row for row in read_metrics(f"{folder}/whole") if "loss" in row]
    return rows[-1], (folder / "whole" / "report.html").read_text()


@pytest.mark.slow
def test_an_odd_router_through_every_command(tmp_path, capsys, odd_router):
    config = odd(optimizer__schedule="constant", optimizer__warmup_steps=0, train__microbatches=2)
    row, page = through_every_command(config, tmp_path, capsys)
    assert row["router/spread_loss"] > 0 and len(row["router/layer_01/best"]) == odd_router.BINS
    assert sum(row["router/layer_01/best"]) == pytest.approx(1)
    assert 1 < row["router/layer_01/experts_per_token"] < 2
    assert "odd" in page and "layer_01" in page


@pytest.mark.parametrize("devices, parts", [(1, 2), *(pytest.param(*cut, marks=pytest.mark.slow) for cut in ((1, 4), (8, 2)))])
def test_the_odd_routers_state_does_not_depend_on_how_a_step_is_cut(devices, parts):
    """The counts of its histogram are whole numbers, so that the median is equal to the bit."""
    one, other = Runner(odd()), Runner(odd(train__microbatches=parts), devices)
    one.step(make_batch(0)), other.step(make_batch(0))
    ours, theirs = (
        jax.device_get(r.state["router_state"]["stack"]["groups"]["block_1"]["moe"]["router"]) for r in (one, other)
    )
    assert ours["applied"] == theirs["applied"] == 1 and ours["median"] > 0
    np.testing.assert_array_equal(ours["median"], theirs["median"])
    np.testing.assert_allclose(ours["norm"], theirs["norm"], rtol=1e-4)


def test_update_counts_the_applied_steps_and_sees_the_new_parameters():
    runner = Runner(odd())
    runner.step(make_batch(0))
    good = jax.tree.map(jnp.copy, runner.state["params"])
    runner.state["params"] = jax.tree.map(lambda a: a * jnp.nan, good)
    assert runner.step(make_batch(1))["skipped"] == 1
    runner.state["params"] = good
    runner.step(make_batch(2))
    state = jax.device_get(runner.state["router_state"]["stack"]["groups"]["block_1"]["moe"]["router"])
    kernel = np.asarray(runner.state["params"]["stack"]["groups"]["block_1"]["moe"]["router"]["kernel"])
    assert state["applied"] == [2] and int(runner.state["step"]) == 3
    np.testing.assert_allclose(state["norm"], [np.linalg.norm(kernel)], rtol=1e-6)


def test_its_facts():
    config = odd()
    validate(config)
    cost = block_flops(config.model, places(config.model)[1].ffn, 32)
    assert cost.router == 2 * 32 * 3 * 4
    stats = {"layer_01": {"counts": np.full(4, 6.0), "dropped": 0.0, "tokens": 16.0}}
    ran = experts_run(config.model, stats)
    assert ran == {"layer_01": 1.5}
    flops = lambda experts: forward_flops_per_token(config.model, 96, 32, experts)
    assert flops(None) - flops(ran) == 0.5 * 2 * 3 * 32 * 64
    config.model.moe.experts = 3
    with pytest.raises(c.ConfigError, match="model.moe.experts=3: odd, but the router odd wants pairs; use an even number"):
        validate(config)


def test_a_registered_router_has_flags():
    config = c.Config()
    assert "odd" in ROUTER_NAMES and config.model.moe.routers.odd.rate == 0.5
    changed = apply_overrides(config, ["--config.plugins=tests.odd_router", "--config.model.moe.routers.odd.rate=0.25"])
    assert changed.model.moe.routers.odd.rate == 0.25 and changed != config and repr(changed) != repr(config)
    assert c.from_dict(json.loads(json.dumps(c.to_dict(changed)))) == changed


def test_what_cannot_be_registered(odd_router):
    with pytest.raises(ValueError, match="the name switch is taken by SwitchConfig|the name 'switch' is taken by SwitchConfig"):
        register_router("switch", odd_router.OddConfig, odd_router.ROUTER)
    with pytest.raises(ValueError, match="a dataclass under RouterOptions"):
        register_router("other", dict, Router(build=None))
    with pytest.raises(c.ConfigError, match="plugins=no_such_module: cannot be imported"):
        apply_overrides(c.Config(), ["--config.plugins=no_such_module"])


@pytest.mark.slow
def test_named_layers_through_every_command(tmp_path, capsys):
    config = named(optimizer__schedule="constant", optimizer__warmup_steps=0)
    row, page = through_every_command(config, tmp_path, capsys)
    assert len(row["router/layer_00/load"]) == 4 and len(row["router/between/load"]) == 8
    assert "router/layer_01/gate_entropy" in row
    for text in ("switch: router", "free: experts", "small_peer: retrieval", "between"):
        assert text in page
    assert run(capsys, generate, f"{tmp_path}/whole", "--prompt=document", "--tokens=4", config_from="workdir")


@pytest.mark.slow
@pytest.mark.parametrize("devices, scan", [(8, True), (1, False)])
def test_named_layers_on_devices_and_unrolled(devices, scan):
    config = named(model__scan=scan)
    if devices > 1:
        config.mesh.expert, config.mesh.data = 2, 4
    one, other = Runner(named()), Runner(config, devices)
    batches = [make_batch(i) for i in range(3)]
    ours, theirs = ([float(r.step(batch)["loss"]) for batch in batches] for r in (one, other))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert ours[-1] < ours[0]
    pools = [path for path, _ in jax.tree.leaves_with_path(one.state["params"]) if "experts" in jax.tree_util.keystr(path)]
    assert sum("pool_small_peer" in jax.tree_util.keystr(path) for path in pools) == 1
    between = one.state["params"]["stack"]["between"]
    assert set(between) == {"moe"} and between["moe"]["experts"]["w_in"].shape == (8, 32, 8)
    bias = np.asarray(one.state["router_state"]["stack"]["between"]["moe"]["router"]["bias"])
    assert np.any(bias != 0)


@pytest.mark.slow
def test_two_layers_of_equal_options_are_one():
    """Losses are means over blocks, whatever names their layers have."""
    whole, parts = make_config(model__layers=2), make_config(model__layers=2, model__pattern="a,b")
    parts.model.ffns = tuple(c.FFNConfig(name, kind="routed", moe=c.MoEConfig()) for name in "ab")
    one, other = Runner(whole), Runner(parts)
    stacked = jax.device_get(one.state["params"]["stack"]["groups"]["block_0"])
    split = {f"block_{i}": jax.tree.map(lambda a, i=i: jnp.asarray(a[i : i + 1]), stacked) for i in range(2)}
    other.state["params"] = jax.tree.map(jnp.copy, one.state["params"] | {"stack": {"groups": split}})
    ours, theirs = one.step(make_batch(0)), other.step(make_batch(0))
    chex.assert_trees_all_close(ours["total_loss"], theirs["total_loss"], rtol=1e-6)
    chex.assert_trees_all_close(ours["losses"], theirs["losses"], rtol=1e-6)
    load = lambda metrics, config: by_layer(metrics["stats"], config.model)["layer_01"]["counts"]
    np.testing.assert_array_equal(load(ours, whole), load(theirs, parts))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(name="dense"), "model.ffns[0].name=dense: the name of another feed-forward layer; use another"),
        (dict(name="a b"), "model.ffns[0].name=a b: not a name; use letters, digits and '_'"),
        (
            dict(width=3),
            "model.ffns[0].width=3: without effect on model.ffns[0].kind=routed; use 0, and model.ffns[0].moe.expert_width",
        ),
        (dict(name="other"), "model.pattern=mine: no feed-forward layer 'mine'; use dense, routed, peer, pkm, other"),
        (dict(moe=c.MoEConfig(top_k=9)), "model.ffns[0].moe.top_k=9: at most model.ffns[0].moe.experts=8; lower top_k"),
    ],
)
def test_one_line_for_a_named_layer_that_cannot_be(change, message):
    config = c.Config()
    config.model.pattern = "mine"
    config.model.ffns = (c.FFNConfig(**{"name": "mine", "kind": "routed"} | change),)
    with pytest.raises(c.ConfigError) as error:
        validate(config)
    assert str(error.value).startswith(f"config.{message}")


def names_of_routers(source: str) -> list[str]:
    """Where code asks which router it has: a comparison with `.router`, or the options of one router."""
    found = []
    for node in ast.walk(ast.parse(source)):
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        named = any(isinstance(side, ast.Attribute) and side.attr == "router" for side in sides)
        asked = named and not any(isinstance(side, ast.Constant) and side.value is None for side in sides)
        if asked or (
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "routers"
        ):
            found.append(ast.unparse(node))
    return found


def test_no_router_is_asked_for_its_name():
    package = ROOT / "moe_jax"
    files = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] != "routing"]
    assert len(files) > 80
    found = {str(path.relative_to(package)): names_of_routers(path.read_text()) for path in files}
    assert {path: names for path, names in found.items() if names} == {}
    assert names_of_routers("if moe.router is None: pass") == []
    assert names_of_routers("if moe.router == 'hash': moe.routers.hash.seed") == ["moe.router == 'hash'", "moe.routers.hash"]


@pytest.mark.slow
def test_plan_of_named_layers_and_of_the_odd_router(tmp_path):
    from moe_jax.plan.roofline import CHIPS
    from moe_jax.plan.step import make_plan
    from moe_jax.plan.topology import Topology

    for config in (named(), odd()):
        config.data.tokenizer = "bytes"
        made = make_plan(config, Topology("v5e:2x4", CHIPS["v5e"], 8, jax.devices()))
        assert made.flops > 0 and made.parameters > 0
