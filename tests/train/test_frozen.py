"""Frozen parameters: by a group of scale 0 from the start or on resume, and by a router while the run goes on."""

import chex
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Config, ConfigError, ParameterGroup
from moe_jax.data import ByteTokenizer
from moe_jax.models.decoder import Decoder
from moe_jax.parallel.mesh import mesh_from_config
from moe_jax.routing import ROUTERS
from moe_jax.routing.contract import Router
from moe_jax.routing.switch import Switch
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.frozen import frozen_by_routers
from moe_jax.train.restore import load_run
from moe_jax.train.start import check_resume, resume, run_meta
from moe_jax.train.state import place_state, total_bytes
from tests.train.small import EIGHT, MOVING, Runner, make_batch, make_config
from tests.train.states import data_of

DEVICES = [1, pytest.param(8, marks=pytest.mark.slow)]
MOVING = MOVING | {"train__steps": 300}
KERNEL = "stack/groups/block_0/moe/router/kernel"
TABLE = "embed/embedding"


def flat(tree):
    return flax.traverse_util.flatten_dict(jax.device_get(tree), sep="/")


def moments(state, path):
    adam = state["opt_state"]["dense"][0]
    return [flat(tree)[path] for tree in (adam.mu, adam.nu)]


def paths(state):
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state)]


class Staged(nn.Module):
    """A router that knows the number of applied steps."""

    options: object

    @nn.compact
    def __call__(self, x, inputs):
        self.variable("router_state", "applied", jnp.zeros, (), jnp.int32)
        return Switch(8, 0, self.options, name="inner")(x, inputs)


def staged(after: int, leaf: str = "inner/kernel") -> Router:
    """Switch routing whose kernel is frozen after so many applied steps."""
    return ROUTERS["switch"]._replace(
        build=lambda sizes, options: Staged(options, parent=None),
        update=lambda state, step, sizes, options: {"applied": step.number},
        frozen=lambda state: {leaf: state["applied"] >= after},
    )


SWITCH = {"model__moe__router": "switch", "model__moe__top_k": 1}
INNER = "stack/groups/block_0/moe/router/inner/kernel"


@pytest.mark.parametrize("devices", DEVICES)
def test_a_router_freezes_its_kernel_after_five_steps(monkeypatch, devices):
    """For 200 steps of AdamW with decay and left-over momentum the kernel, its moments and its average keep their bits."""
    monkeypatch.setitem(ROUTERS, "switch", staged(5))
    runner = Runner(make_config(**SWITCH, **MOVING, **(EIGHT if devices == 8 else {})), devices)
    runner.losses(4)
    before = flat(runner.state["params"])[INNER]
    runner.losses(1)
    kernel, left = flat(runner.state["params"])[INNER], moments(runner.state, INNER)
    assert (kernel != before).any() and np.abs(left[0]).max() > 0
    experts = flat(runner.state["params"])["stack/groups/block_0/moe/experts/w_in"]
    runner.losses(200)
    after = flat(runner.state["params"])
    np.testing.assert_array_equal(after[INNER], kernel)
    np.testing.assert_array_equal(flat(runner.state["ema"])[INNER], kernel)
    for a, b in zip(moments(runner.state, INNER), left):
        np.testing.assert_array_equal(a, b)
    assert (after["stack/groups/block_0/moe/experts/w_in"] != experts).any()
    assert runner.state["router_state"]["stack"]["groups"]["block_0"]["moe"]["router"]["applied"].tolist() == [205]


@pytest.mark.slow
def test_a_router_and_a_group_freeze_alike(monkeypatch):
    """The same norm, and so the same clipping and updates, whether the kernel is frozen by a flag or not differentiated."""

    def first_steps(after, *groups):
        monkeypatch.setitem(ROUTERS, "switch", staged(after))  # as the step is traced
        # The z loss makes the kernel's share of the norm large.
        settings = {"model__moe__routers__switch__z_loss": 1.0, "optimizer__clip_norm": 0.0, "optimizer__epsilon": 1e-3}
        runner = Runner(make_config(**SWITCH, **settings, optimizer__groups=groups))
        norm, first = float(runner.step(make_batch(0))["gradient_norm"]), jax.device_get(runner.state)
        return runner, norm, first

    by_flag, norm, _ = first_steps(0)
    by_group, same, _ = first_steps(0, ParameterGroup("inner/kernel", 0.0))
    _, whole, first = first_steps(10**6)
    share = np.linalg.norm(moments(first, INNER)[0] / 0.1)  # mu = (1 - b1) * gradient
    assert share > 0.1 * whole
    np.testing.assert_allclose([norm, same], np.sqrt(whole**2 - share**2), rtol=1e-5)
    np.testing.assert_allclose(*([float(r.step(make_batch(1))["loss"])] for r in (by_flag, by_group)), rtol=1e-5)
    chex.assert_trees_all_close(*(jax.device_get(r.state["params"]) for r in (by_flag, by_group)), rtol=1e-4, atol=1e-6)


def test_a_router_that_names_no_parameter_is_refused(monkeypatch):
    monkeypatch.setitem(ROUTERS, "switch", staged(5, leaf="bias"))
    runner = Runner(make_config(**SWITCH))
    with pytest.raises(ValueError, match="ROUTER.frozen of switch names stack/.*/router/bias, which is no parameter"):
        runner.step(make_batch(0))


def test_flags_of_stacked_and_single_layers(monkeypatch):
    """Each layer has its own flag, which broadcasts against its kernel."""
    router = ROUTERS["switch"]._replace(frozen=lambda state: {"kernel": state["on"]})
    monkeypatch.setitem(ROUTERS, "switch", router)
    layer = lambda on: {"moe": {"router": {"on": jnp.asarray(on)}}}  # noqa: E731
    state = {"stack": {"groups": {"block_0": layer([True, False])}, "last": layer(True)}}
    shapes = {"stack": {"groups": {"block_0": layer(0)}, "last": layer(0)}}
    shapes["stack"]["groups"]["block_0"]["moe"]["router"] = {"kernel": jnp.zeros((2, 4, 3))}
    shapes["stack"]["last"]["moe"]["router"] = {"kernel": jnp.zeros((4, 3))}
    model = make_config(**SWITCH, model__layers=2, model__inserts="last=routed@2").model
    found = frozen_by_routers(model, state, shapes)
    assert {path: flag.shape for path, flag in found.items()} == {KERNEL: (2, 1, 1), "stack/last/moe/router/kernel": (1, 1)}
    assert found[KERNEL].ravel().tolist() == [True, False]


FREEZE = (ParameterGroup("router|embed", 0.0), ParameterGroup("experts", 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_frozen_on_resume(tmp_path, devices):
    """A dense leaf and a table with row-wise gradients, with momentum: 200 steps later they have their bits, and no moments."""
    base = MOVING | {"model__row_gradients": True, "model__tied_embeddings": False} | (EIGHT if devices == 8 else {})
    first = Runner(make_config(**base, optimizer__groups=FREEZE[1:]), devices)
    first.losses(5)
    assert np.abs(moments(first.state, KERNEL)[0]).max() > 0
    with Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(5, first.state, {})
        second = Runner(make_config(**base, optimizer__groups=FREEZE), devices)
        held = total_bytes(second.state)
        with jax.set_mesh(second.mesh):
            second.state, lines = resume(second.config, second.model, second.mesh, checkpoints)
    kernel, table = (flat(first.state["params"])[path] for path in (KERNEL, TABLE))
    # Two moments and an average of each, and of the table the count of updates of each row.
    dropped = 3 * (kernel.size + table.size) + len(table)
    assert lines == [
        "resumed at step 5",
        f"optimizer.groups freezes {kernel.size + table.size:,} parameters in 2 arrays: "
        f"{dropped:,} numbers of their moments and averages are dropped",
    ]
    assert total_bytes(first.state) - held == 4 * dropped == total_bytes(first.state) - total_bytes(second.state)
    assert not [
        path for path in paths(second.state) if path.startswith(("opt_state", "ema")) and ("router" in path or TABLE in path)
    ]
    experts = "stack/groups/block_0/moe/experts/w_in"
    for a, b in zip(moments(second.state, experts), moments(first.state, experts)):
        np.testing.assert_array_equal(a, b)
    second.losses(200)
    after = flat(second.state["params"])
    np.testing.assert_array_equal(after[KERNEL], kernel)
    np.testing.assert_array_equal(after[TABLE], table)
    assert (after[experts] != flat(first.state["params"])[experts]).any()
    with Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(205, second.state, {})
        assert not [path for path in checkpoints.restore_paths() if path.startswith(("opt_state", "ema")) and "router" in path]


def test_a_frozen_pool_has_no_row_gradients():
    peer = {"model__peer__experts": 24**2, "model__peer__heads": 2, "model__peer__top_k": 4, "model__peer__key_width": 8}
    config = make_config(model__pattern="peer", optimizer__groups=(ParameterGroup("peer/experts", 0.0),), **peer)
    runner = Runner(config)
    pool = "stack/groups/block_0/peer/experts"
    before = flat(runner.state["params"])
    runner.losses(1)
    after = flat(runner.state["params"])
    assert runner.state["opt_state"]["rows"] == {}
    np.testing.assert_array_equal(after[pool], before[pool])
    assert (after[TABLE] != before[TABLE]).any()


PARAMETERS = ("embed/embedding", "stack/groups/block_0/moe/router/kernel", "stack/groups/block_0/moe/experts/w_in")


def groups(*rows):
    config = Config()
    config.optimizer.groups = tuple(ParameterGroup(*row) for row in rows)
    return config


@pytest.mark.parametrize(
    "before, after",
    [
        ([], [("router", 0.0)]),
        ([("router", 0.5)], [("router", 0.0)]),
        ([("router", 0.0)], [("router", 0.0), ("experts", 0.0)]),
        ([("experts", 0.5, 0.1)], [("router", 0.0), ("experts", 0.5, 0.1)]),
        ([("router", 0.0, 0.1)], [("router/kernel", 0.0)]),
    ],
)
def test_groups_may_freeze_on_resume(before, after):
    assert check_resume(groups(*before), groups(*after), PARAMETERS) == []


@pytest.mark.parametrize(
    "before, after, what",
    [
        ([("router", 0.0)], [], "learning_rate_scale of stack/groups/block_0/moe/router/kernel 0 -> 1"),
        ([("router", 0.0)], [("router", 0.5)], "learning_rate_scale of .*router/kernel 0 -> 0.5"),
        ([], [("experts", 0.5)], "learning_rate_scale of .*experts/w_in 1 -> 0.5"),
        ([("experts", 1.0, 0.1)], [("router", 0.0), ("experts", 1.0, 0.2)], "weight_decay of .*experts/w_in 0.1 -> 0.2"),
        # A new group before the others takes a parameter out of its own.
        ([("stack", 0.5)], [("w_in", 1.0), ("stack", 0.0)], "learning_rate_scale of .*experts/w_in 0.5 -> 1"),
    ],
)
def test_groups_may_change_in_no_other_way_on_resume(before, after, what):
    limit = rf"^config.optimizer.groups: may change on resume only to freeze; differing: {what}; set the groups back, or start"
    with pytest.raises(ConfigError, match=limit) as error:
        check_resume(groups(*before), groups(*after), PARAMETERS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["now", "with the average of all"])
def test_evaluation_reads_the_average_of_what_learns_and_the_rest_as_it_is(tmp_path, form):
    """`form`: of the checkpoint; averages of frozen parameters, which there once were, are not read."""
    config = make_config(optimizer__ema_decay=0.9, optimizer__groups=(ParameterGroup("router", 0.0),))
    tokenizer, mesh = ByteTokenizer(), mesh_from_config(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = place_state(Decoder(config.model, tokenizer.vocab_size), config, mesh)
    assert KERNEL not in flat(state["ema"])
    everything = jax.tree.map(lambda a: a + 1, state["params"])
    learned = {path: leaf for path, leaf in flat(everything).items() if path != KERNEL}
    state["ema"] = everything if form != "now" else flax.traverse_util.unflatten_dict(learned, sep="/")
    with Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(3, jax.tree.map(jnp.asarray, state), run_meta(config, data_of(tokenizer), 3))
    got, want = flat(load_run(tmp_path, config).variables["params"]), flat(state["params"])
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path] if path == KERNEL else want[path] + 1)
