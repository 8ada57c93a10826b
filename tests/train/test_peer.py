import os

import chex
import flax.traverse_util
import jax
import numpy as np
import pytest

from moe_jax.models.places import by_layer
from moe_jax.train.routing_metrics import routing_metrics
from tests.train.small import BATCH, LENGTH, Runner, make_batch, make_config

INSERT = {"model__pattern": "dense", "model__layers": 1, "model__inserts": "middle=peer@1"}
SMALL = {"experts": 24**2, "heads": 2, "top_k": 4, "key_width": 8}
POOL = "stack/middle/peer/experts"


def make(overrides=INSERT, **peer):
    options = {f"model__peer__{name}": value for name, value in (SMALL | peer).items()}
    return make_config(**options | overrides)


def leaf(tree, path):
    return flax.traverse_util.flatten_dict(tree, sep="/")[path]


@pytest.mark.parametrize("kind", ["peer", pytest.param("pkm", marks=pytest.mark.slow)])
def test_it_learns(kind):
    runner = Runner(make(INSERT | {"model__inserts": f"middle={kind}@1"}))
    losses = runner.losses(20)
    assert losses[-1] < losses[0] - 0.2
    state = runner.state["router_state"]["stack"]["middle"]["peer"]["router"]
    assert np.abs(state["mean"]).max() > 1e-3 and np.abs(np.asarray(state["variance"]) - 1).max() > 1e-3


OPTIONS = {
    "one query": {"share_keys": False, "query_rank": 6, "score": "sigmoid", "gate_scale": 2.0},
    "raw": {"score": "raw", "query_norm": "none", "shared_width": 16},
    "token hash": {"selector": "token_hash", "gate_scale": 4.0, "shared_width": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["peer", "pkm"])
@pytest.mark.parametrize("options", OPTIONS)
def test_any_router_learns_and_is_evaluated(options, kind):
    runner = Runner(make(INSERT | {"model__inserts": f"middle={kind}@1", "model__residual_init": 0.1}, **OPTIONS[options]))
    losses = runner.losses(20)
    assert losses[-1] < losses[0] - 0.2
    batch = make_batch(0)
    variables = {name: runner.state[name] for name in ("params", "router_state")}
    out = jax.jit(runner.model.apply)(variables, batch["tokens"], batch["positions"], batch["segment_ids"])
    row = routing_metrics(by_layer(out.stats, runner.config.model))
    assert 0 < row["router/usage"] <= 1 and 0 < row["router/gate_entropy"] <= np.log(4) + 1e-6


def test_a_table_of_token_ids_stays_and_its_experts_learn():
    """Only those of tokens that were seen."""
    runner = Runner(make(selector="token_hash", experts=900, heads=2))
    table = np.asarray(leaf(runner.state["router_state"], "stack/middle/peer/router/table"))
    before, batch = np.array(leaf(runner.state["params"], POOL)), make_batch(0)
    runner.step(batch)
    np.testing.assert_array_equal(leaf(runner.state["router_state"], "stack/middle/peer/router/table"), table)
    seen = table[np.unique(batch["tokens"][batch["segment_ids"] > 0])]
    touched = (leaf(runner.state["params"], POOL) != before).any(axis=(1, 2))
    np.testing.assert_array_equal(np.flatnonzero(touched), np.unique(seen))
    assert table.shape == (96, 8) and 0 < touched.sum() < 900


@pytest.mark.slow
@pytest.mark.fused
@pytest.mark.parametrize("options", OPTIONS)
def test_scan_over_any_router_equals_unrolled_ones(options):
    states = []
    for scan in (True, False):
        overrides = {"model__pattern": "peer", "model__layers": 2, "optimizer__epsilon": 1e-3, "model__scan": scan}
        runner = Runner(make(overrides, **OPTIONS[options]))
        runner.losses(1)
        states.append(jax.device_get(runner.state))
    chex.assert_trees_all_equal(*states)


@pytest.mark.fused
def test_scan_over_groups_of_pools_equals_unrolled_ones_and_recomputation():
    """The first gives the same bits where XLA optimises; recomputed batch statistics may round differently."""
    overrides = {"model__pattern": "peer", "model__layers": 2, "optimizer__epsilon": 1e-3, "data__sequence_length": 32}
    states = []
    for change in ({}, {"model__scan": False}, {"model__remat": True}):
        runner = Runner(make(overrides | change))
        runner.step(make_batch(0, 32))
        states.append(jax.device_get(runner.state))
    if os.environ.get("MOE_JAX_TEST_OPTIMIZED") == "1":
        chex.assert_trees_all_equal(states[0], states[1])
    chex.assert_trees_all_close(states[0], states[1], rtol=1e-4, atol=1e-8)
    chex.assert_trees_all_close(states[0], states[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "mesh, parts",
    [
        pytest.param({}, 1, marks=pytest.mark.slow),
        ({"mesh__expert": 4, "mesh__fsdp": 2}, 2),
        pytest.param({"mesh__expert": 2, "mesh__data": 4, "model__peer__split": "experts"}, 1, marks=pytest.mark.slow),
    ],
    ids=["1 device", "width over 4 of 8, 2 parts", "experts over 2 of 8"],
)
def test_rows_give_the_first_update_of_dense_gradients(mesh, parts):
    """Clipping, accumulation and the merge over devices see the gradient that the other form has on one device."""
    results = {}
    # Without batch statistics, which are those of a microbatch.
    options = {"train__microbatches": parts, "optimizer__weight_decay": 0.0, "model__peer__query_norm": "layernorm"}
    for form, where in (("rows", mesh), ("dense", {})):
        runner = Runner(make(INSERT | options | where, row_gradients=form == "rows"), 8 if where else 1)
        before = np.array(leaf(runner.state["params"], POOL))
        metrics = runner.step(make_batch(0))
        results[form] = metrics["gradient_norm"], jax.device_get(runner.state["params"])
    np.testing.assert_allclose(results["rows"][0], results["dense"][0], rtol=1e-5)
    chex.assert_trees_all_close(results["rows"][1], results["dense"][1], atol=3e-5)
    after = leaf(results["rows"][1], POOL)
    touched = (after != before).any(axis=(1, 2))
    assert 0 < touched.sum() < len(touched)


@pytest.mark.slow
@pytest.mark.parametrize("split, options", [("width", ""), ("experts", ""), ("width", "one query"), ("experts", "token hash")])
def test_eight_devices_are_one(split, options):
    runs = []
    for mesh, devices in (({}, 1), ({"mesh__expert": 4, "mesh__data": 2}, 8)):
        # With a small epsilon Adam makes whole steps of what is 0 but for rounding, and other experts are chosen.
        peer = OPTIONS.get(options, {})
        runner = Runner(make(INSERT | mesh | {"optimizer__epsilon": 1e-3}, split=split, **peer), devices)
        runs.append((runner.losses(6), jax.device_get(runner.state["router_state"])))
        if devices == 8:
            shard = leaf(runner.state["params"], POOL).addressable_shards[0].data
            assert shard.size * 4 == leaf(runner.state["params"], POOL).size
    np.testing.assert_allclose(runs[1][0], runs[0][0], rtol=1e-5)
    chex.assert_trees_all_close(runs[1][1], runs[0][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        {"optimizer__row_optimizer": "adagrad"},
        pytest.param(
            {"model__peer__share_pool": True, "model__inserts": "middle=peer@1,last=peer@1", "train__microbatches": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["insert", "shared, 2 parts"],
)
def test_a_step_takes_no_memory_of_the_pools_size(overrides):
    """Nor does it compute anything of that size: on a CPU the result of every operation lies in memory."""
    side = 400
    runner = Runner(make(INSERT | overrides, experts=side**2))
    pool = side**2 * 2 * runner.config.model.width * 4
    compiled = runner._step.lower(runner.state, make_batch(0)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < pool / 2
    dense = Runner(make(INSERT, experts=side**2, row_gradients=False))
    assert dense._step.lower(dense.state, make_batch(0)).compile().memory_analysis().temp_size_in_bytes > pool / 2


def test_evaluation_says_how_evenly_the_pool_is_used():
    runner = Runner(make())
    batch = make_batch(0)
    args = batch["tokens"], batch["positions"], batch["segment_ids"]
    variables = {name: runner.state[name] for name in ("params", "router_state")}
    out = jax.jit(runner.model.apply)(variables, *args)
    row = routing_metrics(by_layer(out.stats, runner.config.model))
    assert 0 < row["router/usage"] <= 1 and 0 < row["router/middle/unevenness"] < np.log(SMALL["experts"])
    training = routing_metrics(by_layer(runner.step(batch)["stats"], runner.config.model))
    assert "router/usage" not in training and training["router/gate_entropy"] > 0


@pytest.mark.slow
def test_routed_and_retrieving_layers_live_in_one_model():
    overrides = {"model__pattern": "routed,peer", "model__layers": 2, "model__inserts": "last=pkm@2"}
    runner = Runner(make(overrides))
    losses = runner.losses(10)
    assert losses[-1] < losses[0]
    stats = by_layer(runner.step(make_batch(0))["stats"], runner.config.model)
    real = int((make_batch(0)["segment_ids"] > 0).sum())
    assert real < BATCH * LENGTH and {int(sums["tokens"]) for sums in stats.values()} == {real}
    row = routing_metrics(stats)
    assert row["router/load_max_over_mean"] == row["router/layer_00/load_max_over_mean"]


@pytest.mark.slow
def test_one_pool_for_all_layers():
    """Its gradient is the sum over the layers', in both forms."""
    overrides = {"model__pattern": "peer", "model__layers": 2, "model__inserts": "last=peer@2", "optimizer__weight_decay": 0.0}
    results = []
    for rows in (True, False):
        runner = Runner(make(overrides, share_pool=True, row_gradients=rows, query_norm="layernorm"))
        paths = [path for path in flax.traverse_util.flatten_dict(runner.state["params"], sep="/") if path.endswith("/experts")]
        assert paths == ["stack/pool/experts"]
        results.append((runner.step(make_batch(0))["gradient_norm"], jax.device_get(runner.state["params"])))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    chex.assert_trees_all_close(results[0][1], results[1][1], atol=3e-5)
