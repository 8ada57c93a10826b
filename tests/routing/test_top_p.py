import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ConfigError, MoEConfig
from moe_jax.config.routers import TopPConfig
from moe_jax.routing.losses import entropy_loss
from moe_jax.routing.top_p import TopP
from moe_jax.types import RouterInputs
from tests.compiled import apply

T, D, E = 60, 8, 6


def route(**options):
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (T, D), jnp.float64)
        kernel = jax.random.normal(jax.random.key(2), (D, E), jnp.float64)
        valid = np.arange(T) % 5 != 0
        module = TopP(E, options=TopPConfig(**options), param_dtype=jnp.float64)
        result = apply(module, {"params": {"kernel": kernel}}, x, RouterInputs(train=True, valid=valid))
        p = np.exp(np.asarray(x @ kernel))
        return *jax.device_get(result), p / p.sum(1, keepdims=True), valid


@pytest.mark.parametrize("max_k", [0, 2])
@pytest.mark.parametrize("p", [0.3, 0.7, 1.0])
def test_against_the_definition(p, max_k):
    choice, losses, stats, probabilities, valid = route(p=p, max_k=max_k)
    most, overflow, counts = max_k or E, 0, np.zeros(E)
    for t in range(T):
        order, chosen, total = np.argsort(-probabilities[t]), [], 0.0
        while valid[t] and total < p and len(chosen) < E:
            chosen.append(order[len(chosen)])
            total += probabilities[t, chosen[-1]]
        overflow += max(len(chosen) - most, 0)
        chosen = chosen[:most]
        counts[chosen] += 1
        np.testing.assert_array_equal(choice.expert_ids[t], chosen + [E] * (most - len(chosen)))
        np.testing.assert_allclose(choice.gates[t, : len(chosen)], probabilities[t, chosen], rtol=1e-12)
        assert not np.any(choice.gates[t, len(chosen) :])
    np.testing.assert_array_equal(stats["counts"], counts)
    assert stats["overflow"] == overflow and (overflow > 0) == (max_k > 0 and p > 0.3)
    used = probabilities[valid]
    np.testing.assert_allclose(losses["entropy"], -np.mean(np.sum(used * np.log(used), 1)), rtol=1e-12)
    np.testing.assert_allclose(losses["balance"], E * np.sum(counts / counts.sum() * used.mean(0)), rtol=1e-12)


def test_the_entropy_loss_sharpens():
    logits = jnp.asarray([[1.0, 0.5, 0.0]])
    gradient = jax.grad(lambda z: entropy_loss(jax.nn.softmax(z), jnp.ones(1, bool)))(logits)
    assert gradient[0, 0] < 0 < gradient[0, 2]


def test_bad_options():
    moe = MoEConfig(router="top_p")
    moe.routers.top_p.max_k = 9
    with pytest.raises(ConfigError, match="max_k=9"):
        moe.options.check(moe, "model.moe.", 64)
    moe.routers.top_p.max_k = 1
    for execution, capacity in (("capacity", 0.0), ("dropless", 1.5)):
        moe.execution, moe.eval_capacity = execution, capacity
        with pytest.raises(ConfigError, match="max_k=1"):
            moe.options.check(moe, "model.moe.", 64)
