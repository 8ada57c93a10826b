import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.routers import ReMoEConfig
from moe_jax.routing.contract import Sizes, Step
from moe_jax.routing.remoe import ReMoE, sparsity_loss, update
from moe_jax.types import RouterInputs
from tests.compiled import apply

T, D, E = 30, 6, 5


def route(options=None, valid=None, weight=0.5):
    x = jax.random.normal(jax.random.key(1), (T, D))
    kernel = jax.random.normal(jax.random.key(2), (D, E))
    variables = {"params": {"kernel": kernel}, "router_state": {"weight": jnp.float32(weight)}}
    result = apply(ReMoE(E, 2, options or ReMoEConfig()), variables, x, RouterInputs(valid=valid, train=True))
    return *result, np.maximum(np.asarray(x @ kernel), 0)


def test_gates_are_the_positive_logits():
    choice, _, stats, r = route()
    gates = np.zeros((T, E + 1))
    for t in range(T):
        gates[t, choice.expert_ids[t]] += choice.gates[t]
    np.testing.assert_allclose(gates[:, :E], r, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(stats["counts"], np.sum(r > 0, axis=0))
    assert stats["overflow"] == 0


def test_max_k_keeps_the_highest_and_counts_the_rest():
    choice, _, stats, r = route(ReMoEConfig(max_k=2))
    assert choice.expert_ids.shape == (T, 2)
    np.testing.assert_allclose(choice.gates, -np.sort(-r, axis=-1)[:, :2], rtol=1e-5, atol=1e-6)
    assert stats["overflow"] == np.sum(np.maximum(np.sum(r > 0, axis=-1) - 2, 0)) > 0


def test_sparsity_loss_against_a_loop():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        r, valid = np.maximum(rng.normal(size=(T, E)), 0), rng.uniform(size=T) < 0.7
        counts = np.sum(r[valid] > 0, axis=0)
        expected = 0.0
        for t in np.flatnonzero(valid):
            expected += sum(E / (2 * valid.sum()) * counts[e] * r[t, e] for e in range(E)) / valid.sum()
        args = jnp.asarray(r), jnp.asarray(counts), 2, jnp.asarray(valid)
        np.testing.assert_allclose(sparsity_loss(*args), expected, rtol=1e-13)


def test_the_loss_carries_its_weight():
    np.testing.assert_allclose(route(weight=0.5)[1]["sparsity"], 5 * route(weight=0.1)[1]["sparsity"], rtol=1e-6)


@pytest.mark.parametrize("active, factor", [(3.0, 1.2), (1.0, 1 / 1.2), (2.0, 1.0)])
def test_controller(active, factor):
    """It steers the mean over the model: one layer's own counts do not matter."""
    stats = {"counts": jnp.full(E, 7.0), "overflow": jnp.float32(0), "tokens": jnp.float32(10)}
    total = {"counts": jnp.full(E, active * 20 / E), "overflow": jnp.float32(0), "tokens": jnp.float32(20)}
    new = update({"weight": jnp.float32(3e-8)}, Step(stats, total, {}, jnp.int32(1), 10), Sizes(E, 2), ReMoEConfig())
    np.testing.assert_allclose(new["weight"], 3e-8 * factor, rtol=1e-6)


def test_the_controller_stays_in_range():
    """It comes back from either end."""
    total = {"counts": jnp.full(E, 30.0), "overflow": jnp.float32(0), "tokens": jnp.float32(10)}
    few = total | {"counts": jnp.zeros(E)}

    def moved(weight, total):
        step = Step(total, total, {}, jnp.int32(1), 10)
        return update({"weight": jnp.float32(weight)}, step, Sizes(E, 2), ReMoEConfig())["weight"]

    up, down = lambda weight: moved(weight, total), lambda weight: moved(weight, few)
    low, high = down(1e-20), up(1e6)
    assert 0 < low <= 1e-20 * 1.001 and up(low) > low
    assert np.isfinite(high) and down(high) < high
