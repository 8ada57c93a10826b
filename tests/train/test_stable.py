"""StableMoE's two stages inside the training step: what is frozen, what learns on, restarts around the switch."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Config
from moe_jax.routing.stable import LIGHT
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.router_state import start_router_state
from moe_jax.train.start import resume
from tests.train.small import EIGHT, MOVING, VOCABULARY, Runner, make_batch, make_config


def config_of(steps: int, stage_1: float, **overrides) -> Config:
    options = {"model__moe__routers__stable__stage_1": stage_1, "model__moe__routers__stable__light_width": 6}
    sizes = {"model__layers": 2, "model__moe__experts": 4, "model__moe__top_k": 1, "train__steps": steps}
    return make_config(model__moe__router="stable", **sizes | options | MOVING | overrides)


def routers(tree):
    """The leaves of both blocks' routers: name -> [2, ...]."""
    return jax.device_get(tree)["stack"]["groups"]["block_0"]["moe"]["router"]


def moments(runner, name):
    adam = runner.state["opt_state"]["dense"][0]
    return [routers(tree)[name] for tree in (adam.mu, adam.nu)]


CASES = [(1, True)] + [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, False), (8, True), (8, False))]


@pytest.mark.parametrize("devices, scan", CASES)
def test_stage_2_keeps_the_routing(devices, scan):
    """For 200 steps: the light routers, their moments and averages, and the tables have their bits; the centroids learn."""
    runner = Runner(config_of(205, 4.9 / 205, model__scan=scan, **(EIGHT if devices == 8 else {})), devices)
    rows = [runner.step(make_batch(i)) for i in range(4)]
    assert not np.any(routers(runner.state["router_state"])["frozen"])
    for losses in (row["losses"] for row in rows):  # of two blocks, whose mean this is
        assert losses["distillation"] > 0 and losses["balance"] != 0
    runner.step(make_batch(4))
    params, state = routers(runner.state["params"]), routers(runner.state["router_state"])
    assert np.all(state["frozen"])
    scores = np.einsum("gvw,gwe->gve", params["light_embedding"], params["light_kernel"])
    np.testing.assert_array_equal(state["table"], np.argmax(scores, axis=-1))
    assert np.any(state["table"][0] != state["table"][1]), "each block has a table of its own"
    left = {name: moments(runner, name) for name in LIGHT}
    assert all(np.abs(a).max() > 0 for pair in left.values() for a in pair)
    for step in range(200):
        metrics = runner.step(make_batch(step))
        assert metrics["losses"]["distillation"] == 0 == metrics["losses"]["balance"]
    after, average = routers(runner.state["params"]), routers(runner.state["ema"])
    for name in LIGHT:
        np.testing.assert_array_equal(after[name], params[name])
        np.testing.assert_array_equal(average[name], params[name])
        for a, b in zip(moments(runner, name), left[name]):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(routers(runner.state["router_state"])["table"], state["table"])
    assert np.all(np.any(after["backbone"]["kernel"] != params["backbone"]["kernel"], axis=1))


def test_no_token_changes_its_expert_after_the_switch():
    """Of the same rows, in training and in evaluation, whatever the parameters have become."""
    runner = Runner(config_of(12, 0.25))
    batch = make_batch(0)
    chosen = []
    for step in range(12):
        runner.step(make_batch(step))
        variables = {name: runner.state[name] for name in ("params", "router_state")}
        run = jax.jit(lambda v: runner.model.apply(v, batch["tokens"], batch["positions"], batch["segment_ids"], record=True))
        stats = jax.device_get(run(variables).stats)
        chosen.append(stats["groups"]["block_0"]["matrix"] > 0)
    assert np.any(chosen[0] != chosen[2])
    for later in chosen[3:]:
        np.testing.assert_array_equal(later, chosen[2])


@pytest.mark.slow
@pytest.mark.parametrize("cut", [2, 3, 4])
def test_a_restart_around_the_switch(tmp_path, cut):
    """After the third of eight steps; before, at and after it: the same bits as in one piece."""
    config = config_of(8, 0.3)
    whole, first, second = (Runner(config) for _ in range(3))
    for step in range(8):
        whole.step(make_batch(step))
    for step in range(cut):
        first.step(make_batch(step))
    assert np.all(routers(first.state["router_state"])["frozen"]) == (cut >= 3)
    with Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(cut, first.state, {})
        with jax.set_mesh(second.mesh):
            second.state, _ = resume(config, second.model, second.mesh, checkpoints)
    for step in range(cut, 8):
        second.step(make_batch(step))
    flat = lambda state: flax.traverse_util.flatten_dict(jax.device_get({n: state[n] for n in ("params", "router_state")}))
    ours, theirs = flat(second.state), flat(whole.state)
    for path in theirs:
        np.testing.assert_array_equal(ours[path], theirs[path], str(path))


def test_a_skipped_step_is_no_step_of_stage_1():
    runner = Runner(config_of(10, 0.2))
    runner.step(make_batch(0))
    good = jax.tree.map(jnp.copy, runner.state["params"])
    runner.state["params"] = jax.tree.map(lambda a: a * jnp.nan, good)
    assert runner.step(make_batch(1))["skipped"] == 1
    assert not np.any(routers(runner.state["router_state"])["frozen"])
    runner.state["params"] = good
    runner.step(make_batch(2))
    assert np.all(routers(runner.state["router_state"])["frozen"])


BACKBONES = {
    "top_k": {"model__moe__top_k": 2, "model__moe__routers__top_k__bias_rate": 0.01},
    "base": {},
    "switch": {},
    "window": {"model__moe__routers__stable__light_router": "window"},
    "balanced": {"model__moe__routers__stable__light_router": "balanced"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACKBONES)
def test_other_kinds_in_stacked_blocks(kind):
    """Two blocks with each backbone and light router start, learn, and are frozen after two of four steps, on 8 devices."""
    options = dict(BACKBONES[kind])
    if kind in ("top_k", "base", "switch"):
        options["model__moe__routers__stable__backbone"] = kind
    shares = np.random.default_rng(0).dirichlet(np.ones(VOCABULARY))
    after = []
    for devices in (1, 8) if kind == "top_k" else (8,):
        runner = Runner(config_of(4, 0.5, **options | (EIGHT if devices == 8 else {})), devices)
        with jax.set_mesh(runner.mesh):
            state = start_router_state(runner.state["router_state"], lambda: shares, runner.config.model, VOCABULARY)
        runner.state["router_state"] = state
        metrics = [runner.step(make_batch(step)) for step in range(4)]
        assert [int(m["frozen"]) for m in metrics] == {"balanced": [0] * 4, "window": [0, 0, 6, 6]}.get(kind, [0, 0, 4, 4])
        assert all(np.isfinite(m["loss"]) for m in metrics)
        state = routers(runner.state["router_state"])
        if kind == "balanced":
            assert np.array_equal(*state["table"])
        elif kind != "window":
            assert np.all(state["frozen"]) and np.any(state["table"][0] != state["table"][1])
        after.append([m["loss"] for m in metrics])
    for losses in after:
        np.testing.assert_allclose(losses, after[0], rtol=2e-4)
