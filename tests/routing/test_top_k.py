import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ConfigError, MoEConfig
from moe_jax.config.routers import TopKConfig
from moe_jax.routing.contract import Sizes, Step
from moe_jax.routing.top_k import TopK, choose, update
from moe_jax.types import RouterInputs
from tests.compiled import apply

T, D, E = 10, 6, 4


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_choice(top_k):
    with jax.enable_x64(True):
        logits = np.random.default_rng(0).normal(size=(T, E))
        choice, chosen, probabilities = choose(jnp.asarray(logits), top_k, TopKConfig())
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        ids = np.argsort(-p, axis=-1, kind="stable")[:, :top_k]
        gates = np.take_along_axis(p, ids, -1)
        if top_k > 1:
            gates = gates / gates.sum(-1, keepdims=True)
        chex.assert_type(choice, jnp.int32)
        np.testing.assert_array_equal(choice, ids)
        np.testing.assert_allclose(chosen, gates, rtol=1e-12)
        np.testing.assert_allclose(probabilities, p, rtol=1e-12)


def test_bias_moves_the_choice_and_not_the_gates():
    logits = jnp.asarray([[1.0, 0.5, 0.0, -1.0]])
    bias = jnp.asarray([-1.0, 0.0, 0.0, 1.0])
    ids, gates, p = choose(logits, 2, TopKConfig(), bias)
    np.testing.assert_array_equal(ids, [[3, 1]])
    np.testing.assert_allclose(gates[0], p[0, [3, 1]] / (p[0, 3] + p[0, 1]), rtol=1e-6)
    gradient = jax.grad(lambda bias: jnp.sum(choose(logits, 2, TopKConfig(), bias)[1]))(bias)
    assert not np.any(gradient)


def test_equal_logits_choose_the_first():
    ids, gates, _ = choose(jnp.zeros((3, E)), 2, TopKConfig())
    np.testing.assert_array_equal(ids, [[0, 1]] * 3)
    np.testing.assert_allclose(gates, 0.5)


def test_extreme_logits_stay_finite():
    """One probability is 1, the others underflow; the gates of K = 2 still sum to 1."""
    logits = jnp.asarray([[1e4, -1e4, -1e4, 0.0]])
    gates, gradient = jax.value_and_grad(lambda z: jnp.sum(choose(z, 2, TopKConfig())[1]))(logits)
    np.testing.assert_allclose(gates, 1)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("logits", [[-200.0, 1.0, 2.0, 0.0], [-200.0] * 4, [300.0, -300.0, 0.0, 1.0]])
def test_scores_that_underflow_have_finite_gradients(score, logits):
    def total(z):
        _, gates, probabilities = choose(z, 2, TopKConfig(score=score))
        return jnp.sum(gates) + jnp.sum(probabilities**2)

    value, gradient = jax.value_and_grad(total)(jnp.asarray([logits]))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_logits_are_of_full_precision():
    """Without `precision` a TPU multiplies float32 in bfloat16."""
    apply = lambda x: TopK(E, 2).apply({"params": {"kernel": jnp.ones((D, E))}}, x, RouterInputs())
    jaxpr = str(jax.make_jaxpr(apply)(jnp.ones((T, D))))
    assert jaxpr.count("dot_general") == 1 and "Precision.HIGHEST" in jaxpr


def test_variables():
    x = jnp.ones((T, D))
    init = lambda router: jax.jit(router.init)(jax.random.key(0), x, RouterInputs(train=None))
    apply = jax.jit(lambda variables: TopK(E, 2).apply(variables, x, RouterInputs()))
    variables = init(TopK(E, 2))
    kernel = variables["params"]["kernel"]
    assert kernel.names == ("embed", None)
    chex.assert_shape(kernel.value, (D, E))
    np.testing.assert_allclose(variables["router_state"]["load"], 1 / E)
    with_bias = init(TopK(E, 2, 0, TopKConfig(bias_rate=0.1)))
    assert set(with_bias["router_state"]) == {"load", "bias"}
    chex.assert_trees_all_equal(with_bias["params"], variables["params"])
    # Without a bias the parameters are enough.
    chex.assert_trees_all_equal(apply({"params": variables["params"]}), apply(variables))


def test_state_bias_is_used():
    x = jax.random.normal(jax.random.key(1), (T, D))
    router = TopK(E, 1, 0, TopKConfig(bias_rate=0.1))
    variables = router.init(jax.random.key(0), x, RouterInputs())
    variables["router_state"]["bias"] = jnp.asarray([0.0, 0.0, 2.0, 0.0])
    assert np.all(router.apply(variables, x, RouterInputs())[0].expert_ids == 2)


def test_update():
    state, sizes = {"load": jnp.full(E, 0.25), "bias": jnp.zeros(E)}, Sizes(E, 2)
    step = lambda state, counts, options: update(
        state, Step({"counts": jnp.asarray(counts)}, {}, {}, jnp.int32(1), 10), sizes, options
    )
    new = step(state, [8.0, 2.0, 4.0, 2.0], TopKConfig(bias_rate=0.1))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    np.testing.assert_allclose(new["bias"], [-0.1, 0.1, 0, 0.1])
    np.testing.assert_allclose(new["load"], 0.99 * 0.25 + 0.01 * np.asarray([8, 2, 4, 2]) / 16, rtol=1e-6)
    zero_sum = step(state, [8.0, 2.0, 4.0, 2.0], TopKConfig(bias_rate=0.1, zero_sum_bias=True))
    np.testing.assert_allclose(zero_sum["bias"], np.asarray([-0.1, 0.1, 0, 0.1]) - 0.025, rtol=1e-6)
    idle = step(state, [0.0] * E, TopKConfig(bias_rate=0.1))
    chex.assert_trees_all_equal(idle, state)
    assert set(step({"load": state["load"]}, [1.0] * E, TopKConfig())) == {"load"}


def quantile_step(bias, rate=1.0, seed=0, tokens=4000):
    """(counts before, the new bias) of skewed sigmoid scores by the quantile rule."""
    options = TopKConfig(score="sigmoid", bias_rate=rate, bias_rule="quantile", balance_loss=0)
    x = np.random.default_rng(seed).normal(size=(tokens, D)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(D, E)).astype(np.float32)
    x[:, 0] = 1
    kernel[0] = [2, 1, 0, -2]
    state = {"load": jnp.full(E, 1 / E), "bias": jnp.asarray(bias, jnp.float32)}
    module = TopK(E, 2, options=options)
    _, _, stats = apply(module, {"params": {"kernel": kernel}, "router_state": state}, x, RouterInputs(train=True))
    step = Step(stats, stats, {}, jnp.int32(1), 10)
    return np.asarray(stats["counts"]), update(state, step, Sizes(E, 2), options)["bias"]


def test_the_quantile_rule_balances_in_a_few_rounds():
    bias = np.zeros(E)
    first, _ = quantile_step(bias)
    for _ in range(12):
        counts, bias = quantile_step(bias)
    np.testing.assert_allclose(counts, 4000 * 2 / E, rtol=0.03)
    assert first.max() > 1.5 * 2000 and abs(np.sum(bias)) < 1e-5
    other, _ = quantile_step(bias, seed=5)
    np.testing.assert_allclose(other, 4000 * 2 / E, rtol=0.1)


def test_the_quantile_rule_is_its_equation():
    """b <- the (n+1)-th largest of s - a, a the (K+1)-th largest of s - b, n = T K / E; the bias here is -b less its mean."""
    bias = np.asarray([-0.2, 0.0, 0.1, 0.1], np.float32)
    x = np.random.default_rng(0).normal(size=(4000, D)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(D, E)).astype(np.float32)
    x[:, 0] = 1
    kernel[0] = [2, 1, 0, -2]
    s = 1 / (1 + np.exp(-(x @ kernel)))
    a = np.sort(s + bias, axis=1)[:, -3]
    wanted = -np.sort(s - a[:, None], axis=0)[-(4000 * 2 // E + 1)]
    wanted -= wanted.mean()
    np.testing.assert_allclose(quantile_step(bias)[1], wanted, atol=2 / 1024)
    half = quantile_step(bias, 0.5)[1]
    np.testing.assert_allclose(half, (wanted + bias) / 2 - np.mean(bias) / 2, atol=2 / 1024)


@pytest.mark.parametrize(
    "options",
    [
        {"bias_rate": 0.0},
        {"bias_rate": 1.5},
        {"score": "sqrt_softplus"},
        {"groups": 2, "kept_groups": 2},
        {"top_k": 4},
    ],
)
def test_what_the_quantile_rule_cannot_do(options):
    moe = MoEConfig(experts=4, top_k=options.pop("top_k", 2))
    for name, value in ({"bias_rate": 0.1, "bias_rule": "quantile"} | options).items():
        setattr(moe.routers.top_k, name, value)
    with pytest.raises(ConfigError, match="bias_rule=quantile"):
        moe.options.check(moe, "model.moe.", 64)
