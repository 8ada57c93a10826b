import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ParameterGroup
from moe_jax.models.places import by_layer
from moe_jax.train import step as train_step
from moe_jax.train.routing_metrics import routing_metrics
from moe_jax.train.step import make_train_step
from tests.train.small import BATCH, EIGHT, LENGTH, VOCABULARY, Runner, make_batch, make_config

MESHES = {
    "expert=8": {"mesh__expert": 8},
    "fsdp=2,expert=4": {"mesh__fsdp": 2, "mesh__expert": 4, "model__moe__exchange": "all_to_all"},
    "expert=4,tensor=2": {
        "mesh__expert": 4,
        "mesh__tensor": 2,
        "model__remat": True,
        "model__moe__exchange": "ragged",
        "model__moe__exchange_buffer": 1.25,
    },
}


@pytest.fixture(scope="module")
def one_device():
    runner = Runner(make_config())
    return runner.losses(20), jax.device_get(runner.state)


@pytest.mark.smoke
def test_loss_falls(one_device):
    losses, state = one_device
    assert losses[-1] < losses[0] - 0.2
    assert state["step"] == 20 and state["skipped"] == 0


@pytest.mark.parametrize(
    "mesh", [pytest.param(m, marks=pytest.mark.slow if m in ("expert=8", "expert=4,tensor=2") else ()) for m in MESHES]
)
def test_any_mesh_gives_the_losses_of_one_device(one_device, mesh):
    runner = Runner(make_config(**MESHES[mesh]), devices=8)
    np.testing.assert_allclose(runner.losses(20), one_device[0], rtol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.device_get(runner.state), one_device[1])
    row = routing_metrics(by_layer(runner.step(make_batch(20))["stats"], runner.config.model))
    assert row["router/exchange_bytes"] > 0
    assert row["router/exchange_fallback"] == (row["router/exchange_overflow"] > 0)


def test_initialisation_does_not_depend_on_the_mesh():
    states = [
        jax.device_get(Runner(make_config(**mesh), devices).state["params"])
        for mesh, devices in [({}, 1), (MESHES["fsdp=2,expert=4"], 8)]
    ]
    chex.assert_trees_all_equal(*states)


def test_experts_and_moments_are_split_over_the_mesh():
    runner = Runner(make_config(mesh__expert=4, mesh__tensor=2), devices=8)
    for tree in (runner.state["params"], runner.state["opt_state"]["dense"][0].mu):
        weight = tree["stack"]["groups"]["block_0"]["moe"]["experts"]["w_in"]
        assert weight.sharding.spec == jax.P(None, "expert", "fsdp", "tensor")
        assert weight.addressable_shards[0].data.size * 8 == weight.size


@pytest.mark.slow
@pytest.mark.parametrize("bias_rate", [0.0, 0.01])
def test_accumulation_gives_the_same_router_state(bias_rate):
    """The bias and the loads learn from the counts of the whole step, however many microbatches it has."""
    states = []
    for parts in (1, 2, 4):
        # Without router losses, which are means over a microbatch and so depend on the cut.
        options = {"balance_loss": 0.0, "z_loss": 0.0, "bias_rate": bias_rate}
        options = {f"model__moe__routers__top_k__{name}": value for name, value in options.items()}
        # Adam divides by the root of the second moment: a gradient that is 0 but for rounding would move its parameter
        # by a whole learning rate, and the routes of a few tokens with it.
        runner = Runner(make_config(train__microbatches=parts, optimizer__epsilon=1e-3, **options))
        runner.losses(5)
        states.append(jax.device_get(runner.state["router_state"]))
    router = states[0]["stack"]["groups"]["block_0"]["moe"]["router"]
    assert ("bias" in router) == bool(bias_rate)
    assert np.ptp(router["load"]) > 1e-3
    for state in states[1:]:
        chex.assert_trees_all_equal(state, states[0])


def test_evaluation_leaves_router_state_alone_and_training_moves_it():
    runner = Runner(make_config())
    before = jax.device_get(runner.state["router_state"])
    variables = {name: runner.state[name] for name in ("params", "router_state")}
    batch = make_batch(0)
    _, written = runner.model.apply(
        variables,
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        train=True,
        mutable=["router_state"],
    )
    chex.assert_trees_all_equal(written["router_state"], before)
    runner.step(batch)
    load = runner.state["router_state"]["stack"]["groups"]["block_0"]["moe"]["router"]["load"]
    assert np.abs(load - 1 / 8).max() > 1e-4


@pytest.mark.parametrize("where", [pytest.param("loss_weights", marks=pytest.mark.slow), "parameter"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(where):
    runner = Runner(make_config(optimizer__ema_decay=0.9, mesh__expert=2), devices=2)
    runner.step(make_batch(0))
    if where == "parameter":
        experts = runner.state["params"]["stack"]["groups"]["block_0"]["moe"]["experts"]
        experts["w_in"] = jax.device_put(experts["w_in"].at[0, 3, 0, 0].set(jnp.nan), experts["w_in"].sharding)
    before = jax.device_get(runner.state)
    batch = make_batch(1)
    if where == "loss_weights":
        batch["loss_weights"][5, 5] = np.inf
    metrics = runner.step(batch)
    after = jax.device_get(runner.state)
    counters = ("step", "skipped", "skipped_in_row")
    assert [int(after[name]) for name in counters] == [2, 1, 1] and metrics["skipped_in_row"] == 1
    for name in set(before) - set(counters):
        chex.assert_trees_all_equal(after[name], before[name])
    if where == "loss_weights":
        runner.step(make_batch(2))
        assert [int(runner.state[name]) for name in counters] == [3, 1, 0]


def test_a_gradient_that_is_not_finite_skips_the_step_too():
    """Of a finite loss whose gradient is too large for the square of its norm."""
    runner = Runner(make_config(model__moe__routers__top_k__z_loss=1e25))
    before = jax.device_get(runner.state["params"])
    metrics = runner.step(make_batch(0))
    assert np.isfinite(metrics["total_loss"]) and np.isinf(metrics["gradient_norm"]) and metrics["skipped"] == 1
    chex.assert_trees_all_equal(jax.device_get(runner.state["params"]), before)


@pytest.mark.slow
def test_clipping_bounds_the_norm_that_is_applied():
    """The first moments show the gradient as Adam gets it: its norm is the limit, and half the limit gives half of it."""
    moments = []
    for clip in (0.5, 0.25):
        runner = Runner(make_config(optimizer__clip_norm=clip))
        norm = runner.step(make_batch(0))["gradient_norm"]
        assert norm > 0.5
        moments.append(jax.device_get(runner.state["opt_state"]["dense"][0].mu))
    # mu = (1 - b1) * clipped gradient
    total = np.sqrt(sum((a**2).sum() for a in jax.tree.leaves(moments[0])))
    np.testing.assert_allclose(total, 0.1 * 0.5, rtol=1e-5)
    chex.assert_trees_all_close(moments[0], jax.tree.map(lambda a: 2 * a, moments[1]), rtol=1e-5)


ROWS = {"model__tied_embeddings": False, "optimizer__weight_decay": 0.0}


@pytest.mark.parametrize(
    "mesh, parts",
    [
        ({}, 1),
        pytest.param(EIGHT, 2, marks=pytest.mark.slow),
        pytest.param(EIGHT, 1, marks=pytest.mark.slow),
        pytest.param({}, 2, marks=pytest.mark.slow),
    ],
    ids=["1 device", "8 devices, 2 parts", "8 devices", "1 device, 2 parts"],
)
def test_row_gradients_give_the_first_update_of_dense_ones(mesh, parts):
    """Clipping, accumulation and the merge over devices see the same gradient in both forms."""
    devices = 8 if mesh else 1
    results = {}
    for rows in (False, True):
        runner = Runner(make_config(model__row_gradients=rows, train__microbatches=parts, **ROWS, **mesh), devices)
        before = jax.device_get(runner.state["params"]["embed"]["embedding"])
        batch = make_batch(0)
        metrics = runner.step(batch)
        results[rows] = metrics["gradient_norm"], jax.device_get(runner.state["params"]), before
    np.testing.assert_allclose(results[True][0], results[False][0], rtol=1e-5)
    chex.assert_trees_all_close(results[True][1], results[False][1], atol=2e-5)
    table, before = results[True][1]["embed"]["embedding"], results[True][2]
    touched = np.unique(batch["tokens"])
    untouched = np.setdiff1d(np.arange(len(table)), touched)
    assert len(untouched) and np.array_equal(table[untouched], before[untouched])
    assert (np.abs(table[touched] - before[touched]).max(axis=1) > 1e-5).all()


def results_of_shape(jaxpr, shape) -> collections.Counter:
    """How often each primitive of a program, inner ones too, makes an array of this shape."""
    found = collections.Counter()
    for eqn in jaxpr.eqns:
        found[eqn.primitive.name] += sum(getattr(v.aval, "shape", None) == shape for v in eqn.outvars)
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += results_of_shape(inner, shape)
    return +found


def test_the_step_with_row_gradients_has_no_dense_table_gradient():
    """Neither the sum over tokens nor Adam's arithmetic has the table's size: its rows and moments are only read and set."""
    arithmetic, made = {"sqrt", "div", "sub", "integer_pow", "square"}, {}
    for rows in (False, True):
        # The output table has the same shape; frozen, it has no update either.
        groups = (ParameterGroup("^output$", 0.0),)
        runner = Runner(make_config(model__row_gradients=rows, optimizer__groups=groups, **ROWS))
        program = jax.make_jaxpr(make_train_step(runner.model, runner.config))(runner.state, make_batch(0))
        width = runner.config.model.width
        made[rows] = [results_of_shape(program.jaxpr, shape) for shape in ((VOCABULARY, width), (VOCABULARY, 1, width))]
    dense, by_row = made[False], made[True]
    assert dense[0]["scatter-add"] == 1 and dense[0]["sqrt"] == 1 and dense[0]["div"] >= 1
    for ops in by_row:
        assert not ops["scatter-add"] and not arithmetic & set(ops)
    assert by_row[1]["scatter"] == 3  # the table and two moments


def test_stats_count_every_real_token_once():
    runner = Runner(make_config(train__microbatches=2, mesh__expert=4), devices=4)
    stats = runner.step(make_batch(0))["stats"]["groups"]["block_0"]
    real = int(make_batch(0)["loss_weights"].sum())
    assert real < BATCH * LENGTH
    chex.assert_shape(stats["counts"], (1, 8))
    assert stats["tokens"].tolist() == [real] and stats["counts"].sum() == 2 * real and stats["dropped"].tolist() == [0]


def test_capacity_drops_are_counted():
    config = make_config(model__moe__execution="capacity", model__moe__capacity_factor=0.5)
    stats = Runner(config).step(make_batch(0))["stats"]["groups"]["block_0"]
    capacity = BATCH * LENGTH * 2 // 8 // 2
    expected = np.maximum(stats["counts"] - capacity, 0).sum()
    assert expected > 0 and stats["dropped"].sum() == expected


def test_bfloat16_compute_keeps_float32_parameters():
    runner = Runner(make_config(model__dtype="bfloat16"))
    losses = runner.losses(20)
    assert losses[-1] < losses[0] - 0.2
    assert {a.dtype for a in jax.tree.leaves(runner.state["params"])} == {jnp.dtype("float32")}


def test_noise_has_a_seed_of_its_own(monkeypatch):
    """The routers' key follows `noise_seed`, and `seed` where that is -1; steps and microbatches have their own."""

    def make_loss(model, config):
        def loss(learned, state, micro, tokens, key):
            noise = jax.random.uniform(key)
            return 0 * learned["params"]["w"] + noise, (noise * tokens, {}, {}, {}, {})

        return loss

    monkeypatch.setattr(train_step, "make_loss", make_loss)

    def noise(step=0, **settings):
        state = {"params": {"w": jnp.float32(0)}, "router_state": {}, "step": jnp.int32(step)}
        return float(train_step.accumulate(None, make_config(**settings), state, make_batch(0))[1].loss)

    assert noise(seed=3) == noise(seed=3, noise_seed=3) == noise(seed=5, noise_seed=3)
    values = [noise(seed=3), noise(seed=5), noise(seed=3, noise_seed=4), noise(step=1, seed=3)]
    assert len(set(values)) == 4
    assert noise(seed=3, train__microbatches=2) != pytest.approx(2 * noise(seed=3))
