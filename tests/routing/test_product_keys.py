import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing.product_keys import ProductKeys, first_scores, update, usage
from moe_jax.types import RouterInputs
from tests.compiled import apply

N, H, K, DK, D, T = 64, 3, 4, 6, 10, 40
VALID = jnp.arange(T) % 5 != 0


def make(dtype=jnp.float32, **options):
    router = ProductKeys(**{"experts": N, "heads": H, "top_k": K, "key_width": DK, "param_dtype": dtype} | options)
    x = jax.random.normal(jax.random.key(1), (T, D), dtype) + 0.5
    return router, nn.unbox(jax.jit(lambda key: router.init(key, x, RouterInputs(train=True)))(jax.random.key(0))), x


@pytest.mark.parametrize("share_keys", [True, False])
@pytest.mark.parametrize("query_norm", ["batchnorm", "layernorm", "none"])
def test_equals_a_search_over_all_experts(share_keys, query_norm):
    """Scores of all N pairs of keys, formed one by one as the paper writes them."""
    router, variables, x = make(share_keys=share_keys, query_norm=query_norm)
    choice, losses, stats = apply(router, variables, x, RouterInputs(train=True, valid=VALID))
    chex.assert_shape(choice, (T, H * K))
    assert not losses
    params = variables["params"]
    q = np.asarray(x, np.float64) @ np.asarray(params["kernel"], np.float64)
    real = np.asarray(VALID)
    if query_norm == "batchnorm":
        q = (q - q[real].mean(0)) / np.sqrt(q[real].var(0) + 1e-5)
    q = q.reshape(T, H, DK)
    if query_norm == "layernorm":
        q = (q - q.mean(-1, keepdims=True)) / np.sqrt(q.var(-1, keepdims=True) + 1e-5)
    keys = np.broadcast_to(np.asarray(params["keys"], np.float64), (H, 2, 8, DK // 2))
    for h in range(H):
        pairs = np.concatenate([np.repeat(keys[h, 0], 8, axis=0), np.tile(keys[h, 1], (8, 1))], axis=1)
        scores = q[:, h] @ pairs.T
        best = np.argsort(-scores, axis=1)[:, :K]
        mine = slice(h * K, h * K + K)
        np.testing.assert_array_equal(choice.expert_ids[real, mine], best[real])
        e = np.exp(np.take_along_axis(scores, best, 1))
        np.testing.assert_allclose(choice.gates[real, mine], (e / e.sum(1, keepdims=True))[real], rtol=2e-5)
    assert (np.asarray(choice.expert_ids)[~real] == N).all() and not np.asarray(choice.gates)[~real].any()
    assert stats["tokens"] == real.sum()
    assert ("query_sum" in stats) == (query_norm == "batchnorm") and "mass" not in stats


def test_running_statistics_are_of_the_whole_step_and_used_in_evaluation():
    router, variables, x = make()
    state, parts = variables["router_state"], []
    for i in range(2):
        inputs = RouterInputs(train=True, valid=VALID[i::2])
        (_, _, stats), written = apply(router, variables, x[i::2], inputs, mutable=["router_state"])
        chex.assert_trees_all_equal(written["router_state"], state)
        parts.append(stats)
    new = update(state, jax.tree.map(jnp.add, *parts))
    q = (np.asarray(x) @ np.asarray(variables["params"]["kernel"]))[np.asarray(VALID)]
    np.testing.assert_allclose(new["mean"], 0.1 * q.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new["variance"], 0.9 + 0.1 * q.var(0, ddof=1), rtol=1e-5)

    ids = lambda state, rows: apply(router, {**variables, "router_state": state}, x[rows], RouterInputs())[0].expert_ids
    np.testing.assert_array_equal(ids(new, slice(None))[7:9], ids(new, slice(7, 9)))  # a row does not see the others
    other = {"mean": 5 + new["mean"], "variance": new["variance"]}
    assert (ids(other, slice(None)) != ids(new, slice(None))).any()
    assert update({}, {}) == {}
    nobody = jax.tree.map(jnp.zeros_like, parts[0])
    chex.assert_trees_all_equal(update(state, nobody), state)


def test_mass_is_the_gates_of_each_expert():
    router, variables, x = make()
    choice, _, stats = apply(router, variables, x, RouterInputs(valid=VALID))
    expected = np.zeros(N)
    real = np.asarray(VALID)
    np.add.at(expected, np.asarray(choice.expert_ids)[real], np.asarray(choice.gates)[real])
    np.testing.assert_allclose(stats["mass"], expected, rtol=1e-5)
    np.testing.assert_allclose(stats["mass"].sum(), H * real.sum(), rtol=1e-5)


@pytest.mark.parametrize("score, scale", [("softmax", 4.0), ("sigmoid", 1.0), ("raw", 2.0)])
def test_mass_and_entropy_of_any_gates_are_of_their_sizes(score, scale):
    """Raw gates may be negative: K is n, so that the worst pairs of some heads are chosen too."""
    router, variables, x = make(experts=16, score=score, gate_scale=scale, share_keys=False, query_rank=6)
    choice, _, stats = apply(router, variables, x, RouterInputs(valid=VALID))
    real, ids, gates = np.asarray(VALID), *(np.asarray(a, np.float64) for a in choice)
    assert np.any(gates < 0) == (score == "raw")
    expected = np.zeros(16)
    np.add.at(expected, ids[real].astype(int), np.abs(gates[real]))
    np.testing.assert_allclose(stats["mass"], expected, rtol=1e-5)
    assert 0 <= usage(stats["mass"])["unevenness"] <= math.log(16)
    shares = np.abs(gates[real]).reshape(-1, K)
    shares = shares / shares.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(stats["entropy_sum"], -np.sum(shares * np.log(shares)) / H, rtol=1e-5)
    if score == "softmax":
        np.testing.assert_allclose(gates[real].reshape(-1, K).sum(1), scale, rtol=1e-5)


def test_one_query_has_one_layer_norm():
    router, variables, x = make(query_norm="layernorm", query_rank=6, share_keys=False, score="raw")
    params = variables["params"]
    assert params["scale"].shape == params["bias"].shape == (6,)
    choice = apply(router, variables, x, RouterInputs())[0]
    q = np.asarray(x, np.float64) @ np.asarray(params["kernel"], np.float64)
    q = (q - q.mean(-1, keepdims=True)) / np.sqrt(q.var(-1, keepdims=True) + 1e-5)
    keys = np.asarray(params["keys"], np.float64)
    scores = (
        np.einsum("tw,hiw->thi", q[:, :3], keys[:, 0])[..., None] + np.einsum("tw,hjw->thj", q[:, 3:], keys[:, 1])[:, :, None]
    )
    best = -np.sort(-scores.reshape(T, H, N), axis=-1)[..., :K]
    np.testing.assert_allclose(choice.gates, best.reshape(T, H * K), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n, top_k", [(32, 4), (128, 16)])
def test_first_scores(n, top_k):
    """Against draws of normal halves, to a tenth: the mean over draws of the mean square."""
    halves = np.random.default_rng(0).normal(size=(400, 2, n)) / math.sqrt(3)
    best = np.sort((halves[:, 0, :, None] + halves[:, 1, None]).reshape(400, -1), axis=1)[:, -top_k:]
    expected = first_scores(n, top_k)
    assert np.all(np.diff(expected) <= 0)
    np.testing.assert_allclose(np.mean(expected**2), np.mean(best**2), rtol=0.1)


def test_a_token_that_is_not_finite_goes_nowhere_and_is_counted():
    router, variables, x = make()
    inputs = RouterInputs(train=True)
    broken = x.at[3, 2].set(jnp.nan)
    choice, _, stats = apply(router, variables, broken, inputs)
    assert (choice.expert_ids[3] == N).all() and stats["nonfinite"] == 1 and stats["tokens"] == T - 1
    without = apply(router, variables, x, inputs._replace(valid=jnp.arange(T) != 3))[0]
    chex.assert_trees_all_equal(choice, without)
    grad = jax.grad(lambda p: jnp.sum(router.apply({**variables, "params": p}, broken, inputs)[0].gates ** 2))
    chex.assert_tree_all_finite(jax.jit(grad)(variables["params"]))


@pytest.mark.parametrize(
    "mass, used, uneven",
    [([1, 1, 1, 1], 1.0, 0.0), ([4, 0, 0, 0], 0.25, math.log(4)), ([3, 1, 0, 0], 0.5, math.log(4) - 0.5623351446188083)],
)
def test_usage(mass, used, uneven):
    result = usage(np.array(mass))
    assert result["usage"] == used
    np.testing.assert_allclose(result["unevenness"], uneven, atol=1e-12)


def test_usage_of_nothing():
    assert usage(np.zeros(4))["usage"] == 0 and math.isnan(usage(np.zeros(4))["unevenness"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"experts": 65}, "experts=65: not a square, which two sets of keys need; use 64 or 81"),
        ({"key_width": 7}, "key_width=7: odd"),
        ({"top_k": 9}, "top_k=9: more than the 8 keys of a half"),
        ({"query_norm": "rms"}, "query_norm='rms': one of batchnorm"),
        ({"score": "relu"}, "ProductKeys score=relu: not a choice; choose softmax or sigmoid or raw"),
        ({"gate_scale": 0.0}, "ProductKeys gate_scale=0.0: at least 1e-06"),
        ({"query_rank": 5, "share_keys": False}, "ProductKeys query_rank=5: odd, but each half of the query meets keys"),
        ({"query_rank": 4}, "ProductKeys share_keys=True: with one query for all heads, ProductKeys query_rank=4, all would"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
