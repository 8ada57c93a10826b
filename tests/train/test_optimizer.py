import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config import ConfigError, ParameterGroup
from moe_jax.train.optimizer import check_groups, group_factors, learning_rate, make_optimizer
from tests.train.small import Runner, make_batch, make_config


@pytest.mark.parametrize("schedule, middle", [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_schedule(schedule, middle):
    config = make_config(
        train__steps=110,
        optimizer__warmup_steps=10,
        optimizer__schedule=schedule,
        optimizer__learning_rate=1.0,
    )
    rate = [float(learning_rate(config.optimizer, config.train, jnp.asarray(step))) for step in range(110)]
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rate[60], middle, rtol=1e-6)
    assert all(a >= b for a, b in zip(rate[10:], rate[11:]))
    last = {"cosine": 0.1, "linear": 0.1, "constant": 1.0}[schedule]
    np.testing.assert_allclose(rate[-1], last, atol=0.02)


def test_equals_optax_adamw():
    config = make_config().optimizer
    params = {"ffn": {"w_in": jnp.ones((3, 2)), "b_in": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    decayed = {"ffn": {"w_in": True, "b_in": False}, "norm": {"scale": False}}
    reference = optax.adamw(0.1, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay, mask=decayed)
    ours = make_optimizer(config)
    theirs, mine = (params, reference.init(params)), (params, ours.init(params))
    for i in range(3):
        gradient = jax.tree.map(lambda a: jnp.cos(a * (i + 1)), params)
        updates, state = reference.update(gradient, theirs[1], theirs[0])
        theirs = optax.apply_updates(theirs[0], updates), state
        updates, state = ours.update(gradient, mine[1], mine[0])
        mine = jax.tree.map(lambda p, u: p - 0.1 * u, mine[0], updates), state
    chex.assert_trees_all_close(mine[0], theirs[0], rtol=1e-6)


def test_groups_first_match_counts_and_zero_freezes():
    groups = (ParameterGroup("experts", 0.0), ParameterGroup("stack", 0.5, 0.3))
    config = make_config(optimizer__groups=groups)
    runner = Runner(config)
    scales, decays = group_factors(config.optimizer, runner.state["params"])
    block = "stack", "groups", "block_0"
    at = lambda tree, *path: tree if not path else at(tree[path[0]], *path[1:])  # noqa: E731
    assert at(scales, *block, "moe", "experts", "w_in") == 0 and at(scales, *block, "moe", "router", "kernel") == 0.5
    assert at(decays, *block, "moe", "router", "kernel") == 0.3 and decays["embed"]["embedding"] == 0.1
    before = jax.device_get(runner.state["params"])
    runner.step(make_batch(0))
    after = jax.device_get(runner.state["params"])
    chex.assert_trees_all_equal(at(after, *block, "moe", "experts"), at(before, *block, "moe", "experts"))
    assert (at(after, *block, "moe", "router", "kernel") != at(before, *block, "moe", "router", "kernel")).any()


def test_a_group_without_effect_is_refused():
    params = {"embed": {"embedding": 1.0}, "stack": {"router": 1.0, "w_in": 1.0}}

    def check(*paths):
        groups = tuple(ParameterGroup(path) for path in paths)
        check_groups(make_config(optimizer__groups=groups).optimizer, params)

    check()
    check("router", "stack", "embed")
    with pytest.raises(ConfigError, match=r"groups\[1\].path=embedd_typo: matches no .* such as embed/embedding"):
        check("embed", "embedd_typo")
    with pytest.raises(ConfigError, match=r"groups\[1\].path=router: all that it matches is in a group before"):
        check("stack", "router")


def test_ema_follows_the_parameters():
    runner = Runner(make_config(optimizer__ema_decay=0.75))
    before = jax.device_get(runner.state["params"])
    runner.step(make_batch(0))
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before, jax.device_get(runner.state["params"]))
    chex.assert_trees_all_close(jax.device_get(runner.state["ema"]), expected, rtol=1e-5, atol=1e-7)
