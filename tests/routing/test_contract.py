"""What every router must do, inside the routed layer. A new router is one row of `ROWS`."""

import functools
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe_jax import compat
from moe_jax.config import MoEConfig
from moe_jax.config.routers import (
    AdaptiveConfig,
    BaseConfig,
    ExpertChoiceConfig,
    ExpertThresholdConfig,
    GShardConfig,
    HashConfig,
    ReMoEConfig,
    RoutersConfig,
    SoftMoEConfig,
    StableConfig,
    SwitchConfig,
    TopKConfig,
    TopPConfig,
)
from moe_jax.layers.moe import MoE
from moe_jax.routing import ROUTERS, Sizes, Step
from moe_jax.routing.statistics import column_counts, matrix
from moe_jax.types import ExpertChoice, RouterInputs, SlotMix

T, D, E, F = 24, 8, 4, 6
VOCABULARY = 64


class Row(NamedTuple):
    """A router with its options. all_served: whether every token gets an output. noisy: whether what a
    token gets depends on its place too. virtual: zero, copy, constant experts."""

    router: str
    options: Any
    top_k: int
    all_served: bool = True
    noisy: bool = False
    virtual: tuple[int, int, int] = (0, 0, 0)


BEHIND_BASE = RoutersConfig(stable=StableConfig(light_width=5, backbone="base"))
GROUPS = TopKConfig(score="sigmoid", groups=2, kept_groups=1, bias_rate=0.01, zero_sum_bias=True, scale=2.5)
ROWS = {
    "top_1": Row("top_k", TopKConfig(), 1),
    "top_2_bias": Row("top_k", TopKConfig(bias_rate=0.01, sequence_loss=0.01), 2),
    "top_2_quantile": Row("top_k", TopKConfig(score="sigmoid", bias_rate=0.5, bias_rule="quantile"), 2),
    "top_2_groups": Row("top_k", GROUPS, 2),
    "top_3_raw": Row("top_k", TopKConfig(score="sqrt_softplus", renormalise="never"), 3),
    "top_2_first": Row("top_k", TopKConfig(order="top_k_first"), 2),
    "top_2_virtual": Row("top_k", TopKConfig(bias_rate=0.01), 2, all_served=False, virtual=(1, 1, 2)),
    "switch": Row("switch", SwitchConfig(jitter=0.01), 1, noisy=True),
    "gshard": Row("gshard", GShardConfig(second_expert="threshold", threshold=0.3), 2),
    "gshard_random": Row("gshard", GShardConfig(), 2, noisy=True),
    "adaptive": Row("adaptive", AdaptiveConfig(threshold=0.2), 2),
    "adaptive_pair": Row("adaptive", AdaptiveConfig(target_k=1.5, gap="pair", renormalise_pair=True, balance_over="single"), 2),
    "top_p": Row("top_p", TopPConfig(p=0.6), 2),
    "top_p_at_most_2": Row("top_p", TopPConfig(p=0.9, max_k=2), 2),
    "expert_threshold": Row("expert_threshold", ExpertThresholdConfig(), 2, all_served=False),
    "expert_threshold_at_most_2": Row("expert_threshold", ExpertThresholdConfig(max_k=2), 2, all_served=False),
    "base": Row("base", BaseConfig(), 1),
    "hash": Row("hash", HashConfig(table="random"), 1),
    "hash_balanced": Row("hash", HashConfig(), 1),
    "stable": Row("stable", StableConfig(light_width=5), 1),
    "stable_window": Row("stable", StableConfig(light_width=5, light_router="window"), 1),
    "stable_base": Row("stable", MoEConfig(router="stable", routers=BEHIND_BASE).options, 1),
    "expert_choice": Row("expert_choice", ExpertChoiceConfig(), 2, all_served=False),
    "remoe": Row("remoe", ReMoEConfig(), 2, all_served=False),
    "remoe_at_most_1": Row("remoe", ReMoEConfig(max_k=1), 1, all_served=False),
    "soft_moe": Row("soft_moe", SoftMoEConfig(slots=2), 1),
}
# By router, not by test: a router's programs are freed before the next one's are compiled.
SLOW = ("stable_window", "stable_base", "adaptive_pair", "top_p_at_most_2", "expert_threshold_at_most_2", "top_2_quantile")
every_router = pytest.mark.parametrize(
    "row", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ROWS], scope="module"
)


def traits(row):
    return ROWS[row].options.traits


def sizes(row):
    return Sizes(E, ROWS[row].top_k, sum(ROWS[row].virtual), VOCABULARY)


def dense(row, assignment, tokens=T):
    """The assignment as a matrix [T, E+V]."""
    return np.asarray(matrix(assignment, tokens, E, sum(ROWS[row].virtual)))


def capacities(row):
    return (0.0, 0.5) if traits(row).capacity else (0.0,)


class Result(NamedTuple):
    y: jax.Array
    losses: dict
    stats: dict
    gradients: dict  # of a sum over y alone, for all parameters


class Setup(NamedTuple):
    """`route(x, inputs)` -> (choice, losses, stats); of the layer, with jit, `forward(x, inputs)` -> (y, Aux) and
    `run(x, inputs)` -> Result."""

    route: Any
    route_jit: Any
    forward: Any
    run: Any
    params: dict
    state: dict


@functools.cache
def setup(name: str, capacity: float = 0.0, train: bool = True) -> Setup:
    row = ROWS[name]
    router = ROUTERS[row.router].build(sizes(name), row.options)
    zeros, copies, constants = row.virtual
    layer = MoE(
        E,
        F,
        row.top_k,
        router,
        activation="swiglu",
        capacity_factor=capacity,
        eval_capacity=capacity,
        zero_experts=zeros,
        copy_experts=copies,
        constant_experts=constants,
    )
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((T, D)), example())
    params, state = variables["params"], variables.get("router_state", {})

    # `train` is static, so it is set inside of jit; elsewhere it is None.
    def static(inputs):
        return inputs._replace(train=train)

    def route(x, inputs):
        alone = {"params": params.get("router", {}), "router_state": state.get("router", {})}
        return router.clone(parent=None).apply(alone, x, static(inputs))

    def forward(x, inputs, params=params):
        return layer.apply({"params": params, "router_state": state}, x, static(inputs))

    def run(x, inputs):
        def loss(params):
            y, aux = forward(x, inputs, params)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, aux)

        (_, (y, aux)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return Result(y, aux.losses, aux.stats, gradients)

    return Setup(route, jax.jit(route), jax.jit(forward), jax.jit(run), params, state)


def example(seed=1):
    """Inputs of two packed rows, the first with padding at its end."""
    half = T // 2
    ids = np.random.default_rng(seed).integers(0, 50, T)
    segments = np.asarray([1] * (half - 3) + [0] * 3 + [1] * 5 + [2] * (half - 5), np.int32)
    return RouterInputs(
        token_ids=ids.astype(np.int32),
        positions=np.tile(np.arange(half, dtype=np.int32), 2),
        segment_ids=segments,
        valid=segments > 0,
        key=jax.random.key(3),
        train=None,
        earlier_ids=np.random.default_rng(seed + 1).integers(-1, 50, (T, 4)).astype(np.int32),
    )


def all_valid(seed=1):
    return example(seed)._replace(segment_ids=np.ones(T, np.int32), valid=np.ones(T, bool))


def hidden(seed=2):
    return np.random.default_rng(seed).normal(size=(T, D)).astype(np.float32)


def assert_close(a, b, limit=1e-5):
    """max|a-b| / max|b| of every array."""
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        error = np.max(np.abs(np.asarray(x) - y)) / max(np.max(np.abs(y)), 1e-30)
        assert error <= limit, f"{jax.tree_util.keystr(path)}: {error}"


def test_every_router_has_a_row():
    assert {row.router for row in ROWS.values()} == set(ROUTERS)


@every_router
def test_shapes_and_types(row):
    s = setup(row)
    choice, losses, stats = jax.eval_shape(s.route, hidden(), example())
    result = jax.eval_shape(s.run, hidden(), example())
    k = ROWS[row].top_k
    if isinstance(choice, SlotMix):
        chex.assert_shape([*choice], (T, E, 2))
        chex.assert_type([*choice], jnp.float32)
    else:
        width = (
            (E, T * k // E)
            if isinstance(choice, ExpertChoice)
            else (T, E if row in ("remoe", "top_p", "expert_threshold") else k)
        )
        chex.assert_shape([*choice], width)
        chex.assert_type([*choice], [jnp.int32, jnp.float32])
    chex.assert_shape(result.y, (T, D))
    chex.assert_type(result.y, jnp.float32)
    chex.assert_shape(list(losses.values()), ())
    chex.assert_type(list(losses.values()), jnp.float32)
    chex.assert_trees_all_equal_structs(losses, result.losses)
    scalars = [result.stats[name] for name in ("tokens", "entropy_sum", "nonfinite", "dropped")]
    chex.assert_shape([result.stats["counts"], *scalars], [(E,), (), (), (), ()])
    chex.assert_type(jax.tree.leaves(result.stats), jnp.float32)
    assert set(result.stats) == {*stats, "dropped"}
    chex.assert_trees_all_equal_shapes_and_dtypes(result.gradients, s.params)
    assert set(ROUTERS[ROWS[row].router].loss_weights(ROWS[row].options)) == set(losses)


@pytest.mark.smoke
@every_router
def test_counts_are_those_of_the_choice(row):
    inputs = example()
    choice, _, stats = setup(row).route_jit(hidden(), inputs)
    gates, valid = dense(row, choice), inputs.valid
    assert not np.any(gates[~valid]) and np.all(gates >= 0)
    assert stats["tokens"] == np.sum(valid) and stats["nonfinite"] == 0
    if isinstance(choice, SlotMix):
        np.testing.assert_allclose(stats["counts"], gates.sum(0), rtol=1e-6)
        np.testing.assert_allclose(stats["counts"].sum(), np.sum(valid), rtol=1e-6)
        return
    np.testing.assert_array_equal(column_counts(stats), np.sum(gates > 0, axis=0))
    ids = np.asarray(choice[0])
    real = ids < T if isinstance(choice, ExpertChoice) else ids != E
    assert np.sum(real) == np.sum(gates > 0), "an expert twice for one token"
    if "unrouted" in stats:
        assert stats["unrouted"] == np.sum(valid & ~np.any(gates > 0, axis=1))


@every_router
def test_no_jit_is_jit(row):
    s = setup(row)
    a, b = s.route(hidden(), example()), s.route_jit(hidden(), example())
    np.testing.assert_array_equal(dense(row, a[0]) > 0, dense(row, b[0]) > 0)
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


@every_router
def test_causal(row):
    """In evaluation, and where the router says so in training too.

    The choice of earlier tokens keeps its bits; their outputs may round differently, as the sizes of the experts'
    groups change.
    """
    if not traits(row).causal:
        pytest.skip("not causal, in evaluation neither")
    x, other, inputs = hidden(), -3 * hidden(5), all_valid()
    cases = [(capacity, train) for capacity in capacities(row) for train in (True, False)]
    for capacity, train in cases if traits(row).causal_training else [(0.0, False)]:
        run, choose = setup(row, capacity, train).forward, setup(row, train=train).route_jit
        (before, aux), chosen = run(x, inputs), dense(row, choose(x, inputs)[0])
        assert (aux.stats["dropped"] > 0) == (capacity > 0)
        for t in (0, 9, T - 2):
            for cut in (slice(t + 1, None), slice(t + 1, t + 2)):
                changed = np.isin(np.arange(T), np.arange(T)[cut])
                later = inputs._replace(token_ids=inputs.token_ids + 3 * changed.astype(np.int32))
                arguments = np.where(changed[:, None], other, x), later
                after, _ = run(*arguments)
                np.testing.assert_array_equal(dense(row, choose(*arguments)[0])[: t + 1], chosen[: t + 1])
                assert_close(after[: t + 1], before[: t + 1], 1e-6)
                if not capacity and ROWS[row].all_served:
                    assert np.any(after[t + 1] != before[t + 1])


@every_router
def test_a_router_that_is_not_causal_says_so(row):
    """Else the test above would not be of any router."""
    if traits(row).causal_training:
        pytest.skip("causal")
    run, x, inputs = setup(row).run, hidden(), all_valid()
    before = run(x, inputs)
    differs = []
    for seed in range(5):
        after = run(np.where(np.arange(T)[:, None] < T // 2, x, 3 * hidden(seed + 10)), inputs)
        differs.append(np.any(after.y[: T // 2] != before.y[: T // 2]))
    assert any(differs)


@every_router
def test_contents_of_padding_change_nothing(row):
    x, inputs = hidden(), example()
    valid = inputs.valid
    for capacity in capacities(row):
        run = setup(row, capacity).run
        clean = run(x, inputs)
        assert not np.any(clean.y[~valid])
        assert capacity or not ROWS[row].all_served or np.all(np.any(clean.y[valid], axis=-1))
        for bad in (100.0, np.nan, np.inf):
            dirty = inputs._replace(token_ids=np.where(valid, inputs.token_ids, np.int32(11)))
            chex.assert_trees_all_equal(run(np.where(valid[:, None], x, np.float32(bad)), dirty), clean)


@every_router
def test_statistics_and_losses_are_of_the_valid(row):
    """As if padding were not there; over twice the tokens sums double and means stay."""
    if not traits(row).causal_training or ROWS[row].noisy:
        pytest.skip("what a token gets depends on the others, or on its place")
    route = setup(row).route_jit
    x, inputs = hidden(), example()
    keep = np.flatnonzero(inputs.valid)
    choice, losses, stats = route(x, inputs)
    short = jax.tree.map(lambda a: a[keep] if a.ndim else a, inputs)
    result = route(x[keep], short)
    np.testing.assert_array_equal(choice.expert_ids[keep], result[0].expert_ids)
    chex.assert_trees_all_close((losses, stats), result[1:], rtol=1e-5)
    double = jax.tree.map(lambda a: np.concatenate([a, a]) if a.ndim else a, inputs)
    twice = route(np.concatenate([x, x]), double)
    chex.assert_trees_all_close(twice[1:], (losses, jax.tree.map(lambda a: 2 * a, stats)), rtol=1e-5)


@every_router
def test_permutation_equivariance(row):
    s = setup(row)
    if ROWS[row].noisy:
        pytest.skip("noise goes by place")
    x, inputs = hidden(), example()
    perm = np.random.default_rng(0).permutation(T)
    permuted = x[perm], jax.tree.map(lambda leaf: leaf[perm] if leaf.ndim else leaf, inputs)
    a, b = dense(row, s.route_jit(x, inputs)[0])[perm], dense(row, s.route_jit(*permuted)[0])
    np.testing.assert_array_equal(a > 0, b > 0)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    a, b = s.run(x, inputs), s.run(*permuted)
    assert_close(a._replace(y=a.y[perm]), b)


@every_router
def test_gradient_reaches_the_router(row):
    """Through the outputs alone, without the losses; not the one to be distilled."""
    s = setup(row)
    if "router" not in s.params:
        pytest.skip("no parameters")
    for path, gradient in jax.tree.leaves_with_path(s.run(hidden(), example()).gradients):
        if "light_" in jax.tree_util.keystr(path):
            assert not np.any(gradient)
            continue
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-3


@every_router
def test_one_device_is_eight(row):
    s = setup(row)
    x, inputs = hidden(), example()
    mesh = compat.make_mesh(jax.devices(), ("data", "fsdp", "expert"), (2, 2, 2))
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, compat.PartitionSpec(compat.BATCH_AXES))
        sharded = jax.tree.map(lambda a: jax.device_put(a, split) if a.ndim else a, (x, inputs))
        choice, eight = s.route_jit(*sharded)[0], s.run(*sharded)
    chex.assert_trees_all_close(choice, s.route_jit(x, inputs)[0], rtol=1e-5, atol=1e-6)
    one = s.run(x, inputs)
    if not isinstance(choice, SlotMix):
        np.testing.assert_array_equal(eight.stats["counts"], one.stats["counts"])
    # One device exchanges nothing.
    stats = {name: value for name, value in eight.stats.items() if not name.startswith("exchange_")}
    assert_close(eight._replace(stats=stats), one)


@pytest.mark.fused
@every_router
def test_bfloat16_activations(row):
    """The router's maths are exactly those of the same numbers in float32."""
    s, narrow = setup(row), hidden().astype(jnp.bfloat16)
    result = s.route_jit(narrow, example())
    gates = result[0][-1]
    chex.assert_type(gates, jnp.float32)
    chex.assert_trees_all_equal(result, s.route_jit(narrow.astype(np.float32), example()))
    if "router" in s.params:
        assert np.any(gates != np.asarray(gates).astype(jnp.bfloat16))


@every_router
def test_equal_logits(row):
    result, valid = setup(row).run(np.zeros((T, D), np.float32), example()), np.sum(example().valid)
    chex.assert_tree_all_finite(result)
    k = ROWS[row].top_k
    if row == "gshard_random":  # a gate of 1/2 at the threshold is always kept
        assert GShardConfig().threshold == 0.5
    wanted = {"remoe": 0, "expert_threshold": 0, "expert_choice": E * np.ceil(valid * k / E)}.get(
        ROWS[row].router, (3 if row == "top_p" else k) * valid
    )
    np.testing.assert_allclose(column_counts(result.stats).sum(), wanted, rtol=1e-6)


@every_router
def test_a_token_that_is_not_finite(row):
    """It goes nowhere and is counted; the rest, gradients too, is that of a batch where it is padding."""
    s = setup(row)
    x, inputs = hidden(), example()
    bad, broken, valid = np.asarray([2, 15]), x.copy(), inputs.valid.copy()
    broken[bad], valid[bad] = [[np.nan], [np.inf]], False
    choice, _, _ = s.route_jit(broken, inputs)
    assert not np.any(dense(row, choice)[bad])
    clean, result = s.run(x, inputs), s.run(broken, inputs)
    if traits(row).causal_training:
        others = np.delete(np.arange(T), bad)
        np.testing.assert_array_equal(result.y[others], clean.y[others])
    assert not np.any(result.y[bad])
    assert result.stats["nonfinite"] == 2 and result.stats["tokens"] == clean.stats["tokens"] - 2
    absent = s.run(x, inputs._replace(valid=valid))
    chex.assert_tree_all_finite(result)
    chex.assert_trees_all_equal(result._replace(stats=None), absent._replace(stats=None))


@every_router
def test_update(row):
    """From sums over a step; the state keeps its structure."""
    router, s = ROUTERS[ROWS[row].router], setup(row)
    if router.update is None or not s.state:
        assert not s.state or router.start
        return
    state, stats = s.state["router"], s.route_jit(hidden(), example())[2]
    new = router.update(state, Step(stats, stats, nn.unbox(s.params["router"]), jnp.int32(1), 1), sizes(row), ROWS[row].options)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_tree_all_finite(new)
    assert any(np.any(new[name] != state[name]) for name in state)


@every_router
def test_start(row):
    """From the training text; the state keeps its structure."""
    router, s = ROUTERS[ROWS[row].router], setup(row)
    if router.start is None:
        return
    shares = np.random.default_rng(0).dirichlet(np.ones(VOCABULARY))
    new = router.start(jax.device_get(s.state["router"]), lambda: shares, sizes(row), ROWS[row].options)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, jax.device_get(s.state["router"]))
