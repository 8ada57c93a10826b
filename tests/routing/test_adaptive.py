import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ConfigError, MoEConfig
from moe_jax.config.routers import AdaptiveConfig, TopKConfig
from moe_jax.layers.moe import MoE
from moe_jax.routing import ROUTERS, Sizes, Step
from moe_jax.routing.adaptive import BINS, Adaptive, gap_of_two_best
from moe_jax.routing.statistics import Histogram, running_mean
from moe_jax.routing.switch import Switch
from moe_jax.routing.top_k import TopK
from moe_jax.types import RouterInputs
from tests.compiled import apply

T, D, E, F = 400, 8, 6, 12


def example(seed=1, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (T, D), dtype), jax.random.normal(jax.random.key(seed + 1), (D, E), dtype)


def route(train=True, valid=None, **options):
    x, kernel = example()
    inputs = RouterInputs(train=train, valid=valid)
    return apply(Adaptive(E, options=AdaptiveConfig(**options)), {"params": {"kernel": kernel}}, x, inputs)


def shares(**options):
    stats = route(**options)[2]
    return float(stats["two_experts_tokens"] / stats["tokens"])


def run_layer(router, top_k):
    """(y, gradients of all parameters and of x) of a layer; the balance loss is in the gradient."""
    layer = MoE(E, F, top_k, router)
    x = example()[0]
    params = layer.init(jax.random.key(0), x)["params"]

    def loss(params, x):
        y, aux = layer.apply({"params": params}, x, train=True)
        return jnp.sum(jnp.sin(y)) + aux.losses["balance"], y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    return y, gradients


@pytest.mark.parametrize("gap", ["raw", "pair", "max"])
def test_always_two_is_top_2(gap):
    top_2 = run_layer(TopK(E, 2, options=TopKConfig(renormalise="never", z_loss=0)), 2)
    ours = run_layer(Adaptive(E, options=AdaptiveConfig(threshold=1, gap=gap)), 2)
    chex.assert_trees_all_close(ours[0], top_2[0], rtol=1e-6, atol=1e-6)
    # The balance loss of top-2 counts both choices, ours the first ones: the router's kernel alone differs.
    for leaf in ("w_in", "w_out"):
        chex.assert_trees_all_close(ours[1][0]["experts"][leaf], top_2[1][0]["experts"][leaf], rtol=1e-5, atol=1e-6)


def test_never_two_is_switch():
    switch, ours = run_layer(Switch(E), 1), run_layer(Adaptive(E, options=AdaptiveConfig(threshold=-1)), 2)
    chex.assert_trees_all_close(ours, switch, rtol=1e-5, atol=1e-6)


def test_always_two_with_the_pair_divided_is_mixtral():
    top_2 = apply(
        TopK(E, 2, options=TopKConfig()), {"params": {"kernel": example()[1]}}, example()[0], RouterInputs(train=True)
    )
    ours = route(threshold=1, renormalise_pair=True)
    chex.assert_trees_all_close(ours[0], top_2[0], rtol=1e-6)


@pytest.mark.parametrize("gap", ["raw", "pair", "max"])
def test_against_the_definition(gap):
    with jax.enable_x64(True):
        x, kernel = example(dtype=jnp.float64)
        threshold = 0.25
        module = Adaptive(
            E, options=AdaptiveConfig(threshold=threshold, gap=gap, balance_over="single"), param_dtype=jnp.float64
        )
        valid = np.arange(T) % 7 != 0
        choice, losses, stats = apply(module, {"params": {"kernel": kernel}}, x, RouterInputs(train=True, valid=valid))
        p = np.exp(np.asarray(x @ kernel))
        p /= p.sum(1, keepdims=True)
        counts, single, ids, gates = np.zeros(E), 0, np.full((T, 2), E), np.zeros((T, 2))
        for t in np.flatnonzero(valid):
            i, j = np.argsort(-p[t])[:2]
            by = {"raw": 1, "pair": p[t, i] + p[t, j], "max": p[t, i]}[gap]
            ids[t, 0], gates[t, 0] = i, p[t, i]
            if (p[t, i] - p[t, j]) / by <= threshold:
                ids[t, 1], gates[t, 1] = j, p[t, j]
            else:
                counts[i] += 1
                single += 1
        assert 0 < single < valid.sum()
        np.testing.assert_array_equal(choice.expert_ids, ids)
        np.testing.assert_allclose(choice.gates, gates, rtol=1e-12)
        np.testing.assert_allclose(losses["balance"], E * np.sum(counts / single * p[valid].mean(0)), rtol=1e-12)
        assert stats["two_experts_tokens"] == valid.sum() - single and stats["tokens"] == valid.sum()
        np.testing.assert_array_equal(stats["counts"], np.bincount(ids.reshape(-1), minlength=E + 1)[:E])


def test_the_balance_loss_of_single_tokens_is_0_without_any():
    losses = route(threshold=1, balance_over="single")[1]
    assert losses["balance"] == 0
    assert route(threshold=1)[1]["balance"] >= 1


def test_share_is_monotone_in_the_threshold():
    for gap in ("raw", "pair", "max"):
        found = [shares(threshold=t, gap=gap) for t in (-1, 0, 0.05, 0.1, 0.2, 0.4, 0.8, 1)]
        assert found[0] == 0 and found[-1] == 1 and found == sorted(found) and found[3] < found[5]


def test_readings_are_of_the_same_pair():
    pair = jnp.asarray([[0.5, 0.3], [0.2, 0.2]])
    np.testing.assert_allclose(gap_of_two_best(pair, "raw"), [0.2, 0], rtol=1e-6)
    np.testing.assert_allclose(gap_of_two_best(pair, "pair"), [0.25, 0], rtol=1e-6)
    np.testing.assert_allclose(gap_of_two_best(pair, "max"), [0.4, 0], rtol=1e-6)


def test_k_of_evaluation():
    for k, share in ((1, 0), (2, 1)):
        stats = route(train=False, threshold=0.1, evaluation_k=k)[2]
        assert stats["two_experts_tokens"] == share * T
    trained = route(threshold=0.1, evaluation_k=1)[2]["two_experts_tokens"]
    assert 0 < trained < T and trained == route(train=False, threshold=0.1)[2]["two_experts_tokens"]


def test_threshold_of_evaluation():
    for k, threshold in ((0.0, 0.3), (1.5, 0.3)):
        x, kernel = example()
        module = Adaptive(E, options=AdaptiveConfig(threshold=0.1, target_k=k, evaluation_threshold=threshold))
        variables = {"params": {"kernel": kernel}, "router_state": {"threshold": jnp.float32(0.1)}}
        found = {train: apply(module, variables, x, RouterInputs(train=train))[2] for train in (True, False)}
        assert found[True]["two_experts_tokens"] / T == pytest.approx(shares(threshold=0.1))
        assert found[False]["two_experts_tokens"] / T == pytest.approx(shares(threshold=0.3))
        assert "gap" not in found[False]


def test_states_keep_their_type_in_float64():
    with jax.enable_x64(True):
        before = {"threshold": jnp.float32(0.1)}
        state = ROUTERS["adaptive"].update(before, step_of(np.linspace(0, 1, 99), 1), Sizes(E, 2), AdaptiveConfig(target_k=1.5))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, before)


def step_of(gaps, number):
    counts = np.histogram(gaps, BINS, (0, 1))[0].astype(np.float32)
    total = {"gap": Histogram(jnp.asarray(counts), 0.0, 1.0)}
    return Step({}, total, {}, jnp.int32(number), 100)


def test_the_controller_finds_the_threshold():
    """The gap that a quarter of the tokens are below, within a bin; each step's own tokens do not matter for long."""
    options, state = AdaptiveConfig(target_k=1.25, target_decay=0.9), {"threshold": jnp.float32(0.1)}
    rng = np.random.default_rng(0)
    for number in range(1, 101):
        state = ROUTERS["adaptive"].update(state, step_of(rng.beta(2, 5, 4000), number), Sizes(E, 2), options)
    gaps = rng.beta(2, 5, 100000)
    assert abs(np.mean(gaps <= state["threshold"]) - 0.25) < 0.01


def test_the_first_step_is_taken_as_it_is():
    state = ROUTERS["adaptive"].update(
        {"threshold": jnp.float32(0.1)}, step_of(np.linspace(0, 1, 1001), 1), Sizes(E, 2), AdaptiveConfig(target_k=1.5)
    )
    np.testing.assert_allclose(state["threshold"], 0.5, atol=1.5 / BINS)


def test_running_mean():
    mean = jnp.float32(7)
    for number, value in enumerate((1.0, 3.0, 8.0), 1):
        mean = running_mean(mean, jnp.float32(value), jnp.int32(number), 0.99)
    np.testing.assert_allclose(mean, 4.0, rtol=1e-6)
    np.testing.assert_allclose(running_mean(jnp.float32(1), jnp.float32(2), jnp.int32(1000), 0.9), 1.1, rtol=1e-6)


def test_with_a_target_the_state_decides():
    x, kernel = example()
    module = Adaptive(E, options=AdaptiveConfig(target_k=1.5, threshold=0.3))
    found = []
    for threshold in (0.05, 0.3):
        variables = {"params": {"kernel": kernel}, "router_state": {"threshold": jnp.float32(threshold)}}
        found.append(apply(module, variables, x, RouterInputs(train=True))[2])
    assert found[0]["two_experts_tokens"] < found[1]["two_experts_tokens"]
    assert found[1]["two_experts_tokens"] / T == pytest.approx(shares(threshold=0.3))
    assert found[0]["gap"].counts.sum() == T


@pytest.mark.parametrize(
    "options, field",
    [
        ({"target_k": 1.0}, "target_k"),
        ({"target_k": 2.0}, "target_k"),
        ({"target_k": 0.5}, "target_k"),
        ({"target_k": 1.5, "threshold": -1.0}, "threshold"),
        ({"evaluation_k": 1, "evaluation_threshold": 0.2}, "evaluation_threshold"),
    ],
)
def test_bad_options(options, field):
    moe = MoEConfig(router="adaptive")
    for name, value in options.items():
        setattr(moe.routers.adaptive, name, value)
    with pytest.raises(ConfigError, match=field):
        moe.options.check(moe, "model.moe.", 64)


def test_good_options():
    moe = MoEConfig(router="adaptive")
    moe.routers.adaptive.target_k = 1.25
    moe.options.check(moe, "model.moe.", 64)
    assert moe.options.experts_per_token(moe, 16) == 1.25
