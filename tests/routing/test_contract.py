"""What every router must do, inside the routed layer. A new router is one row of `ROWS`."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe_jax import compat
from moe_jax.config import SoftmaxTopKConfig
from moe_jax.layers.moe import MoE
from moe_jax.routing import ROUTERS
from moe_jax.types import RouterInputs

T, D, E, F = 24, 8, 4, 6


class Row(NamedTuple):
    router: str
    options: Any
    top_k: int


ROWS = {
    "softmax_top_1": Row("softmax_top_k", SoftmaxTopKConfig(), 1),
    "softmax_top_2_bias": Row("softmax_top_k", SoftmaxTopKConfig(bias_rate=0.01), 2),
}
every_router = pytest.mark.parametrize("row", ROWS)


class Result(NamedTuple):
    y: jax.Array
    losses: dict
    stats: dict
    gradients: dict  # of a sum over y alone, for all parameters


class Setup(NamedTuple):
    """`route(x, inputs)` -> (choice, losses, stats); `run(x, inputs)` -> Result of the layer, with jit."""

    route: Any
    route_jit: Any
    run: Any
    params: dict
    state: dict


@functools.cache
def setup(name: str, capacity: float = 0.0) -> Setup:
    row = ROWS[name]
    router = ROUTERS[row.router].build(E, row.top_k, row.options)
    layer = MoE(E, F, row.top_k, router, activation="swiglu", capacity_factor=capacity)
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((T, D)), example())
    params, state = variables["params"], variables.get("router_state", {})

    # `train` is static, so it is set inside of jit; elsewhere it is None.
    def route(x, inputs):
        alone = {"params": params.get("router", {}), "router_state": state.get("router", {})}
        return router.clone(parent=None).apply(alone, x, inputs._replace(train=True))

    def run(x, inputs):
        def loss(params):
            variables = {"params": params, "router_state": state}
            y, aux = layer.apply(variables, x, inputs._replace(train=True))
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, aux)

        (_, (y, aux)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return Result(y, aux.losses, aux.stats, gradients)

    return Setup(route, jax.jit(route), jax.jit(run), params, state)


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
        step=np.int32(7),
        train=None,
    )


def all_valid(seed=1):
    return example(seed)._replace(segment_ids=np.ones(T, np.int32), valid=np.ones(T, bool))


def hidden(seed=2):
    return np.random.default_rng(seed).normal(size=(T, D)).astype(np.float32)


def test_every_router_has_a_row():
    assert {row.router for row in ROWS.values()} == set(ROUTERS)


@every_router
def test_shapes_and_types(row):
    s = setup(row)
    choice, losses, stats = jax.eval_shape(s.route, hidden(), example())
    result = jax.eval_shape(s.run, hidden(), example())
    k = ROWS[row].top_k
    chex.assert_shape([result.y, *choice], [(T, D), (T, k), (T, k)])
    chex.assert_type([result.y, *choice], [jnp.float32, jnp.int32, jnp.float32])
    chex.assert_shape(list(losses.values()), ())
    chex.assert_type(list(losses.values()), jnp.float32)
    chex.assert_trees_all_equal_structs(losses, result.losses)
    scalars = [result.stats[name] for name in ("tokens", "entropy_sum", "nonfinite", "dropped")]
    chex.assert_shape([result.stats["counts"], *scalars], [(E,), (), (), (), ()])
    chex.assert_type(list(result.stats.values()), jnp.float32)
    assert set(result.stats) == {*stats, "dropped"}
    chex.assert_trees_all_equal_shapes_and_dtypes(result.gradients, s.params)
    assert set(ROUTERS[ROWS[row].router].loss_weights(ROWS[row].options)) == set(losses)


@every_router
def test_counts_are_those_of_the_choice(row):
    inputs = example()
    choice, _, stats = setup(row).route_jit(hidden(), inputs)
    ids = np.asarray(choice.expert_ids)
    assert np.all((ids >= 0) & (ids <= E))
    for chosen in ids:
        real = chosen[chosen < E]
        assert len(set(real)) == len(real), "an expert twice for one token"
    np.testing.assert_array_equal(stats["counts"], np.bincount(ids.ravel(), minlength=E + 1)[:E])
    assert stats["tokens"] == np.sum(inputs.valid) and stats["nonfinite"] == 0
    assert np.all(ids[~inputs.valid] == E) and not np.any(choice.gates[~inputs.valid])


@every_router
def test_no_jit_is_jit(row):
    s = setup(row)
    a, b = s.route(hidden(), example()), s.route_jit(hidden(), example())
    np.testing.assert_array_equal(a[0].expert_ids, b[0].expert_ids)
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


@every_router
@pytest.mark.parametrize("capacity", [0.0, 0.5])
def test_causal(row, capacity):
    if not ROUTERS[ROWS[row].router].causal:
        pytest.skip("not causal")
    run = setup(row, capacity).run
    x, other, inputs = hidden(), -3 * hidden(5), all_valid()
    before = run(x, inputs)
    assert (before.stats["dropped"] > 0) == (capacity > 0)
    for t in (0, 9, T - 2):
        for cut in (slice(t + 1, None), slice(t + 1, t + 2)):
            changed = np.isin(np.arange(T), np.arange(T)[cut])
            later = inputs._replace(token_ids=inputs.token_ids + 3 * changed.astype(np.int32))
            after = run(np.where(changed[:, None], other, x), later)
            np.testing.assert_array_equal(after.y[: t + 1], before.y[: t + 1])
            assert capacity or np.any(after.y[t + 1] != before.y[t + 1])


@every_router
@pytest.mark.parametrize("capacity", [0.0, 0.5])
def test_contents_of_padding_change_nothing(row, capacity):
    run = setup(row, capacity).run
    x, inputs = hidden(), example()
    valid = inputs.valid
    clean = run(x, inputs)
    assert not np.any(clean.y[~valid]) and (capacity or np.all(np.any(clean.y[valid], axis=-1)))
    for bad in (100.0, np.nan, np.inf):
        dirty = inputs._replace(token_ids=np.where(valid, inputs.token_ids, np.int32(11)))
        chex.assert_trees_all_equal(run(np.where(valid[:, None], x, np.float32(bad)), dirty), clean)


@every_router
def test_statistics_and_losses_are_of_the_valid(row):
    """As if padding were not there; over twice the tokens sums double and means stay."""
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
    x, inputs = hidden(), example()
    perm = np.random.default_rng(0).permutation(T)
    permuted = x[perm], jax.tree.map(lambda leaf: leaf[perm] if leaf.ndim else leaf, inputs)
    a, b = s.route_jit(x, inputs)[0], s.route_jit(*permuted)[0]
    np.testing.assert_array_equal(a.expert_ids[perm], b.expert_ids)
    np.testing.assert_allclose(a.gates[perm], b.gates, rtol=1e-5)
    a, b = s.run(x, inputs), s.run(*permuted)
    chex.assert_trees_all_close(a._replace(y=a.y[perm]), b, rtol=1e-5, atol=1e-5)


@every_router
def test_gradient_reaches_the_router(row):
    """Through the outputs alone, without the losses."""
    s = setup(row)
    if "router" not in s.params:
        pytest.skip("no parameters")
    for gradient in jax.tree.leaves(s.run(hidden(), example()).gradients):
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
    np.testing.assert_array_equal(choice.expert_ids, s.route_jit(x, inputs)[0].expert_ids)
    one = s.run(x, inputs)
    np.testing.assert_array_equal(eight.stats["counts"], one.stats["counts"])
    # One device exchanges nothing.
    stats = {name: value for name, value in eight.stats.items() if not name.startswith("exchange_")}
    chex.assert_trees_all_close(eight._replace(stats=stats), one, rtol=1e-5, atol=1e-6)


@every_router
def test_bfloat16_activations(row):
    """The router's maths are exactly those of the same numbers in float32."""
    route = setup(row).route_jit
    narrow = hidden().astype(jnp.bfloat16)
    result = route(narrow, example())
    chex.assert_type(result[0].gates, jnp.float32)
    chex.assert_trees_all_equal(result, route(narrow.astype(np.float32), example()))
    assert np.any(result[0].gates != np.asarray(result[0].gates).astype(jnp.bfloat16))


@every_router
def test_equal_logits(row):
    result = setup(row).run(np.zeros((T, D), np.float32), example())
    chex.assert_tree_all_finite(result)
    assert result.stats["counts"].sum() == ROWS[row].top_k * np.sum(example().valid)
    assert not np.any(result.y)


@every_router
def test_a_token_that_is_not_finite(row):
    """It goes nowhere and is counted; the rest, gradients too, is that of a batch where it is padding."""
    s = setup(row)
    x, inputs = hidden(), example()
    bad, broken, valid = np.asarray([2, 15]), x.copy(), inputs.valid.copy()
    broken[bad], valid[bad] = [[np.nan], [np.inf]], False
    choice, _, _ = s.route_jit(broken, inputs)
    assert np.all(choice.expert_ids[bad] == E) and not np.any(choice.gates[bad])
    clean, result = s.run(x, inputs), s.run(broken, inputs)
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
    if router.update is None:
        assert not s.state
        return
    state, stats = s.state["router"], s.route_jit(hidden(), example())[2]
    new = router.update(state, stats, ROWS[row].options)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_tree_all_finite(new)
    assert any(np.any(new[name] != state[name]) for name in state)
