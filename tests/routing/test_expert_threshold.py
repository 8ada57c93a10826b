import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ConfigError, MoEConfig
from moe_jax.config.routers import ExpertThresholdConfig
from moe_jax.routing import ROUTERS, Sizes, Step
from moe_jax.routing.expert_threshold import BINS, ExpertThreshold
from moe_jax.types import RouterInputs
from tests.compiled import apply

T, D, E = 500, 8, 6


def route(thresholds, max_k=0, train=True, seed=1):
    x, kernel = jax.random.normal(jax.random.key(seed), (T, D)), jax.random.normal(jax.random.key(2), (D, E))
    valid = np.arange(T) % 5 != 0
    variables = {"params": {"kernel": kernel}, "router_state": {"thresholds": jnp.asarray(thresholds, jnp.float32)}}
    module = ExpertThreshold(E, 2, ExpertThresholdConfig(max_k=max_k))
    result = apply(module, variables, x, RouterInputs(train=train, valid=valid))
    return *jax.device_get(result), np.asarray(jax.nn.sigmoid(x @ kernel)), valid


@pytest.mark.parametrize("max_k", [0, 2])
def test_against_the_definition(max_k):
    thresholds = np.linspace(0.3, 0.8, E)
    choice, _, stats, scores, valid = route(thresholds, max_k)
    most, overflow, unrouted, counts = max_k or E, 0, 0, np.zeros(E)
    for t in range(T):
        above = scores[t] - thresholds
        wanted = [e for e in np.argsort(-above) if above[e] > 0 and valid[t]]
        overflow, unrouted = overflow + max(len(wanted) - most, 0), unrouted + (valid[t] and not wanted)
        wanted = wanted[:most]
        counts[wanted] += 1
        np.testing.assert_array_equal(choice.expert_ids[t], wanted + [E] * (most - len(wanted)))
        np.testing.assert_allclose(choice.gates[t, : len(wanted)], scores[t, wanted], rtol=1e-5)
    np.testing.assert_array_equal(stats["counts"], counts)
    assert (stats["overflow"], stats["unrouted"]) == (overflow, unrouted)
    assert unrouted > 0 and (overflow > 0) == (max_k > 0)


def test_after_a_step_each_expert_has_its_share():
    """K / E of the tokens of that step, but for those in the bin of the threshold; of others nearly."""
    stats, valid = route(np.full(E, 0.5))[2], 400
    step = Step(stats, stats, {}, jnp.int32(1), 10)
    state = ROUTERS["expert_threshold"].update({"thresholds": jnp.full(E, 0.5)}, step, Sizes(E, 2), ExpertThresholdConfig())
    again = route(state["thresholds"])[2]
    np.testing.assert_allclose(again["counts"], valid * 2 / E, atol=3)
    other = route(state["thresholds"], seed=7)[2]
    np.testing.assert_allclose(other["counts"], valid * 2 / E, rtol=0.3)
    assert stats["scores"].width == 1 / BINS


def test_no_histogram_in_evaluation():
    assert "scores" not in route(np.full(E, 0.5), train=False)[2]


def test_bad_options():
    moe = MoEConfig(router="expert_threshold")
    moe.routers.expert_threshold.max_k = 1
    with pytest.raises(ConfigError, match="max_k=1"):
        moe.options.check(moe, "model.moe.", 64)
    moe.routers.expert_threshold.max_k, moe.top_k = 0, 8
    with pytest.raises(ConfigError, match="top_k=8"):
        moe.options.check(moe, "model.moe.", 64)
