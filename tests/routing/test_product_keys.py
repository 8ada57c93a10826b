import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing.product_keys import ProductKeys, update, usage
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
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
