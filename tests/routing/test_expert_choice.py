import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.routers import ExpertChoiceConfig
from moe_jax.layers.moe import MoE
from moe_jax.routing.expert_choice import ExpertChoiceRouter
from moe_jax.types import RouterInputs
from tests.compiled import apply, assert_like_reference

T, D, E, F, K = 24, 6, 4, 5, 2


def test_against_a_loop():
    """Each expert's C best tokens, each with its probability over the experts; outputs and gradients."""
    x = jax.random.normal(jax.random.key(1), (T, D))
    valid = np.arange(T) != 5
    layer = MoE(E, F, K, ExpertChoiceRouter(E, K, parent=None), activation="relu")
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x)["params"])

    probabilities = lambda params, x: jax.nn.softmax(x @ params["router"]["kernel"], axis=-1)
    order = np.argsort(-np.asarray(probabilities(params, x)), axis=0)

    def slow(params, x):
        p, y = probabilities(params, x), jnp.zeros_like(x)
        for e in range(E):
            for t in [t for t in order[:, e] if valid[t]][: -(-sum(valid) * K // E)]:
                h = jnp.maximum(x[t] @ params["experts"]["w_in"][e], 0) @ params["experts"]["w_out"][e]
                y = y.at[t].add(p[t, e] * h)
        return y

    inputs = RouterInputs(valid=jnp.asarray(valid), train=True)
    fast = lambda params, x: layer.apply({"params": params}, x, inputs)[0]
    counts = apply(layer, {"params": params}, x, inputs)[1].stats["counts"]
    np.testing.assert_array_equal(counts, 12)  # ceil(23 * 2 / 4)
    assert_like_reference(fast, slow, params, x, limit=1e-5)


def test_padding_takes_no_slot():
    """Three tokens in a batch for 24 are as many to an expert as three alone."""
    x = jax.random.normal(jax.random.key(1), (T, D))
    router = ExpertChoiceRouter(E, K)
    variables = jax.jit(router.init)(jax.random.key(0), x, RouterInputs())
    choice, _, stats = apply(router, variables, x, RouterInputs(valid=jnp.arange(T) < 3))
    alone, _, few = apply(router, variables, x[:3], RouterInputs())
    np.testing.assert_array_equal(stats["counts"], 2)  # ceil(3 * 2 / 4)
    np.testing.assert_array_equal(stats["counts"], few["counts"])
    np.testing.assert_array_equal(choice.token_ids[:, :2], alone.token_ids)
    assert np.all(choice.token_ids[:, 2:] == T)


def test_evaluated_by_tokens():
    """In evaluation each token gets its K best experts with the gates of training, whatever else is in the batch."""
    x = jax.random.normal(jax.random.key(1), (T, D))
    valid = np.arange(T) != 5
    options = ExpertChoiceConfig(evaluation="tokens")
    layer = MoE(E, F, K, ExpertChoiceRouter(E, K, options, parent=None), activation="relu")
    same = MoE(E, F, K, ExpertChoiceRouter(E, K, parent=None), activation="relu")
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x)["params"])
    inputs = lambda train: RouterInputs(valid=jnp.asarray(valid), train=train)
    run = lambda layer, x, train: apply(layer, {"params": params}, x, inputs(train))
    y, aux = run(layer, x, False)
    p = np.asarray(jax.nn.softmax(x @ params["router"]["kernel"], axis=-1))
    expected, counts = np.zeros((T, D)), np.zeros(E)
    for t in np.flatnonzero(valid):
        for e in np.argsort(-p[t])[:K]:
            counts[e] += 1
            h = np.maximum(x[t] @ params["experts"]["w_in"][e], 0)
            expected[t] += p[t, e] * (h @ params["experts"]["w_out"][e])
    assert np.max(np.abs(y - expected)) <= 1e-5 * np.max(np.abs(expected))
    np.testing.assert_array_equal(aux.stats["counts"], counts)
    assert aux.stats["tokens"] == valid.sum() and aux.stats["unrouted"] == 0
    others = jnp.where(jnp.arange(T)[:, None] < T // 2, x, -3 * x)
    np.testing.assert_array_equal(run(layer, others, False)[0][: T // 2], y[: T // 2])
    # In training the option changes nothing, and the experts do choose.
    a, b = run(layer, x, True), run(same, x, True)
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1].stats["counts"], 12)
    assert options.traits.causal and not ExpertChoiceConfig().traits.causal
